"""What measures on a GPU, as far as a CPU can show it: the parts, their file, the tiny sizes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_ranks

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "tools" / "bench"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would be measured")
@pytest.mark.parametrize("script", ["gpu.sh", "gpu/gpu_kernels.py"])
def test_without_a_gpu_one_line_says_so(script, tmp_path):
    file = tmp_path / "gpu.json"
    how = ["bash"] if script.endswith(".sh") else [sys.executable]
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*how, str(BENCH / script), "--json", str(file)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    (line,) = [t for t in (done.stdout + done.stderr).splitlines() if "no GPU" in t]
    assert "no GPU is here" in line
    assert not file.exists()


def part(name, code, *, seconds=60.0, has_figures=True):
    from tools.bench.gpu.run_all import Part

    return Part(name, seconds, ("-c", code), has_figures)


WRITES = (
    "import json, sys\n"
    "file = sys.argv[sys.argv.index('--json') + 1]\n"
    "json.dump({'figures': {'bert16_cuda_bf16_mfu': 0.5, 'h200_copy_gb_s': 4}}, open(file, 'w'))\n"
)


def test_a_part_that_fails_is_reported_and_the_rest_runs():
    from tools.bench.gpu.run_all import exit_code, run_parts, table

    parts = [
        part("good", WRITES + "print('fine')"),
        part("bad", "print('about to'); raise SystemExit('broken')", has_figures=False),
        part("silent", "pass"),
        part("tests", "print('3 passed')", has_figures=False),
    ]
    first, *_, found = run_parts(parts, prefix="h200")
    assert list(first["parts"]) == ["good"]  # results are written after each part
    assert first["figures"] == found["figures"]
    assert found["figures"] == {"h200_bert16_mfu": 0.5, "h200_copy_gb_s": 4}
    outcomes = {name: each["outcome"] for name, each in found["parts"].items()}
    assert outcomes == {
        "good": "passed",
        "bad": "failed (1)",
        "silent": "left no figures",
        "tests": "passed",
    }
    assert "broken" in found["parts"]["bad"]["output"]
    assert exit_code(found) == 1
    assert exit_code({"parts": {"good": found["parts"]["good"]}}) == 0
    assert json.loads(json.dumps(found)) == found
    assert found["date"]
    for text in ("h200_bert16_mfu", "failed (1)", "left no figures"):
        assert text in table(found)


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_part_is_ended_with_what_it_started(is_deaf, tmp_path, monkeypatch):
    """It says where it was, if it can."""
    from tools.bench.gpu import run_all
    from tools.bench.gpu.run_all import run_parts

    monkeypatch.setattr(run_all, "GRACE", 1.0)

    alive = tmp_path / "alive"
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"import signal, time; {ignore}; time.sleep(6); open({str(alive)!r}, 'w')"
    code = (
        "import signal, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('started', flush=True)\n"
        f"{ignore if is_deaf else ''}\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    (found,) = run_parts([part("slow", code, seconds=2.0, has_figures=False)], prefix="h200")
    assert found["parts"]["slow"]["outcome"] == "out of time"
    output = found["parts"]["slow"]["output"]
    assert output.startswith("started")
    assert ("KeyboardInterrupt" in output) != is_deaf
    time.sleep(max(0.0, 8 - (time.monotonic() - started)))
    assert not alive.exists()


def test_what_a_part_leaves_running_is_ended(tmp_path):
    from tools.bench.gpu.run_all import run_parts

    code = (
        "import subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(left.pid)\n"
    )
    (found,) = run_parts([part("quick", code, seconds=30.0, has_figures=False)], prefix="h200")
    quick = found["parts"]["quick"]
    assert quick["outcome"] == "passed"
    assert quick["seconds"] < 30
    there = Path(f"/proc/{int(quick['output'])}/cmdline")  # empty once it is dead
    for _ in range(100):
        if not there.exists() or not there.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("what it started still runs")


def test_a_key_that_ends_the_bench_ends_its_part(tmp_path, monkeypatch):
    """The part has a session of its own, which the terminal does not interrupt."""
    from tools.bench.gpu.run_all import run_parts

    started = tmp_path / "pid"
    code = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    wait = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        if timeout != 30.0:
            return wait(process, timeout)
        while not started.exists() or not started.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run_parts([part("slow", code, seconds=30.0, has_figures=False)], prefix="h200"))
    assert not Path(f"/proc/{started.read_text()}").exists()


def test_all_parts_take_less_than_ten_minutes():
    from tools.bench.gpu.run_all import GRACE, PARTS

    start = 15  # the import of torch, and the device's first call
    assert start + sum(each.seconds + GRACE for each in PARTS) <= 600
    for each in PARTS:
        script = each.command[0]
        assert script == "-m" or Path(script).is_file()


def test_every_file_with_a_gpu_test_is_run():
    from tools.bench.gpu.run_all import gpu_tests

    command = ["grep", "-rlw", "--include=test_*.py", "mark[.]gpu", "tests"]
    found = subprocess.check_output(command, cwd=ROOT, text=True)
    assert {str(ROOT / line) for line in found.splitlines()} == set(gpu_tests())
    kinds = [Path(file).relative_to(ROOT / "tests").parts[0] for file in gpu_tests()]
    assert kinds == sorted(kinds, reverse=True)  # unit tests come first
    assert "distributed" in kinds


def test_figures_are_named_by_the_device():
    from tools.bench.common.timing import device_prefix
    from tools.bench.gpu.run_all import renamed

    assert device_prefix("NVIDIA H200") == "h200"
    assert device_prefix("NVIDIA H200 NVL") == "h200"
    assert device_prefix("NVIDIA H100 80GB HBM3") == "h100_80gb_hbm3"
    figures = {"bert16_cuda_bf16_vs_stock": 2.0, "a100_grow_ms": 1.0}
    assert renamed(figures, "a100") == {"a100_bert16_vs_stock": 2.0, "a100_grow_ms": 1.0}


def test_mfu_counts_what_the_model_computes():
    """BERT-base of 16 layers, its head at 15 % of the positions: 0.777 GFLOP a token."""
    from tools.bench.training.step_job import SHAPES, StepJob

    tokens = SHAPES["bert16"].batch * 512
    job = StepJob("bert16", "bf16", Path(), "cpu", profile=False)
    assert job.flops / tokens == pytest.approx(0.777e9, rel=0.01)


def tiny_roofline():
    from lag_megatron.distributed.world import start_world, stop_world
    from tools.bench.gpu import gpu_kernels

    start_world(tensor=1)
    gpu_kernels.megatron_loss = lambda logits, labels: torch.nn.functional.cross_entropy(
        logits[:, 0].float(), labels[:, 0], reduction="none"
    )  # Megatron's own is compiled, for seconds
    sizes = gpu_kernels.Sizes(
        parameters=12 * 64,
        product=16,
        tokens=8,
        width=16,
        vocabulary=64,
        heads=(("tiny", (1, 2, 8, 4)),),
    )
    found = list(gpu_kernels.roofline(torch.device("cpu"), sizes, rounds=1))
    stop_world()
    return found


def test_every_kernel_has_its_share():
    (parts,) = run_ranks(tiny_roofline, 1)
    found = {name: value for part in parts for name, value in part.items()}
    assert sum(map(len, parts)) == len(found)
    assert "copy_gb_s" in parts[0]
    assert "ce_vs_megatron" in parts[-1]  # of all the most that can fail
    expected = {
        "copy_gb_s", "matmul_tflop_s", "optimizer_bandwidth_share", "grow_bandwidth_share",
        "ce_vs_megatron", "ce_matmul_share", "attention_matmul_share_tiny_full",
        "attention_matmul_share_tiny_causal",
    }  # fmt: skip
    assert expected <= found.keys()
    assert all(value > 0 for value in found.values())


def test_a_grown_state_is_the_one_its_bench_names():
    """12 layers to 16, the four from the fifth on twice."""
    from lag_megatron.kernels.grow import write_runs
    from tools.bench.gpu import grow_kernel

    layer = 3
    old = {state: torch.rand(12 * layer) for state in grow_kernel.STATES}
    new = {state: torch.full((16 * layer,), -1.0) for state in grow_kernel.STATES}
    weights = torch.zeros(16 * layer, dtype=torch.bfloat16)
    origins = [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11]
    write_runs(grow_kernel.runs_of(old, new, weights, layer, drawn=False))
    for state in grow_kernel.STATES:
        grown = old[state].view(12, layer)[origins].view(-1)
        assert torch.equal(new[state], grown)
    assert torch.equal(weights, new["fp32"].bfloat16())
    new["fp32"][8 * layer : 12 * layer] = 0.5
    write_runs(grow_kernel.runs_of(old, new, weights, layer, drawn=True))
    middle = slice(8 * layer, 12 * layer)
    assert (weights[middle] == 0.5).all()
    assert (new["exp_avg"][middle] == 0).all()
    assert torch.equal(new["exp_avg_sq"][middle], old["exp_avg_sq"][4 * layer : 8 * layer])


def test_layers_of_the_grow_bench_are_aligned_as_a_models_are(monkeypatch):
    from lag_megatron.kernels.common.runs import run_table
    from tools.bench.gpu import grow_kernel

    seen = []
    monkeypatch.setattr(grow_kernel, "write_runs", seen.append)
    grow_kernel.shares(torch.device("cpu"), 12 * 1001, rounds=1)
    for runs in seen:
        rows, _ = run_table(runs)
        assert (rows[:, 4] % 2 == 1).all()


@pytest.mark.parametrize("has_file", [False, True])
def test_what_was_not_measured_is_said(has_file, tmp_path):
    from tools.bench import tables

    for bound in tables.BOUNDS:
        if bound.file != "gpu":
            file = tmp_path / f"{bound.file}.json"
            found = json.loads(file.read_text())["figures"] if file.exists() else {}
            content = {"machine": "m", "date": "d", "figures": {**found, bound.figure: 1.0}}
            file.write_text(json.dumps(content))
    if has_file:
        content = {"machine": "NVIDIA H200", "date": "d", "figures": {"h200_bert16_mfu": 0.5}}
        (tmp_path / "gpu.json").write_text(json.dumps(content))
    rows = [row for row in tables.table(tmp_path).splitlines() if "h200_" in row]
    missing = [row for row in rows if "not measured" in row]
    assert (len(rows), len(missing)) == (5, 4 if has_file else 5)
    assert ("| `h200_bert16_mfu` | 0.5 | ≥ 0.45 | met | d | NVIDIA H200 |" in rows) == has_file
