"""The comparison of steps: what trainers start from, and what becomes of one that fails."""

import json
import multiprocessing.pool
from types import SimpleNamespace

import pytest
import torch
from conftest import run_ranks

MODEL = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 4,
         "num_query_groups": 4, "seq_length": 8}  # fmt: skip


def job_of(family, dtype, weights):
    from tools.bench.training import step_job

    like = step_job.SHAPES[family]
    tiny = {"vocabulary": 64, "batch": 2, "peers": (), "lr": 1e-2}
    step_job.SHAPES["tiny"] = step_job.StepShape({**like.model, **MODEL}, **tiny)
    return step_job.StepJob("tiny", dtype, weights, "cpu", profile=False)


def weights_and_losses(family, dtype, weights):
    """Of a tiny model: the file, and the first losses of this project's trainer."""
    from tools.bench.training import step_job, step_peers

    job = job_of(family, dtype, weights)
    step_job.write_weights("tiny", weights, "cpu")
    step = step_peers.ours(job)
    losses = [step(job.batch(number), number) for number in range(3)]
    return torch.load(weights), losses


def losses_of_stock(family, dtype, weights):
    from tools.bench.training import step_peers

    job = job_of(family, dtype, weights)
    step = step_peers.stock(job)
    return [step(job.batch(number), number) for number in range(3)]


@pytest.mark.parametrize(
    ("family", "dtype"), [("bert16", "bf16"), ("decoder1b", "bf16"), ("decoder1b", "fp32")]
)
def test_trainers_start_from_the_same_weights(family, dtype, tmp_path):
    """Masters too: the second step is taken from them."""
    file = tmp_path / "weights.pt"
    ((weights, ours),) = run_ranks(weights_and_losses, 1, family, dtype, file)
    (stock,) = run_ranks(losses_of_stock, 1, family, dtype, file)
    assert ours == pytest.approx(stock, rel=1e-3 if dtype == "bf16" else 1e-5)
    assert abs(ours[2] - ours[1]) > 1e-2 or abs(ours[1] - ours[0]) > 1e-2  # they move
    drawn = torch.cat([w.flatten() for n, w in weights.items() if n.endswith("fc1.weight")])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.2)
    assert all((w == 1).all() for n, w in weights.items() if n.endswith("norm.weight"))


def test_a_trainer_that_fails_is_reported(capsys):
    from tools.bench.training.step import _first_losses

    ours, theirs = multiprocessing.Pipe()
    theirs.send("stock")
    theirs.close()
    assert _first_losses("stock", ours) is None
    assert "stock: ended before" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["none", "losses differ", "stock failed"])
def test_figures_say_whether_losses_agree(fault, tmp_path, monkeypatch):
    from tools.bench.training import step

    times = {"ours": 1.0} if fault == "stock failed" else {"ours": 1.0, "stock": 2.0}
    monkeypatch.setattr(step, "_in_new_process", lambda *given: None)
    monkeypatch.setattr(step, "_measure", lambda *given: (times, fault != "losses differ"))
    file = tmp_path / "figures.json"
    command = ["step.py", "--dtypes", "fp32", "--peers", "stock", "--json", str(file)]
    monkeypatch.setattr("sys.argv", command)
    assert step.main() == (fault != "none")
    figures = json.loads(file.read_text())["figures"]
    assert ("cpu_fp32_vs_stock" in figures) == (fault == "none")
    assert ("unequal_cpu_fp32_vs_stock" in figures) == (fault == "losses differ")
    assert any(name.endswith("cpu_fp32_ours_ms") for name in figures)


@pytest.mark.parametrize("peer", ["stock", "stock_sdpa"])
def test_a_speedup_over_stock_asks_for_stock(peer, monkeypatch):
    """Others may have been asked for alone, or stock may have failed."""
    from tools.bench.training import step

    monkeypatch.setattr(step.multiprocessing.pool.Pool, "apply", lambda *given: 1e12)
    options = SimpleNamespace(shape="small_bert", device="cpu")
    figures = step._report({"ours": 1.0, peer: 2.0}, "fp32", options)
    assert figures[f"small_bert_cpu_fp32_vs_{peer}"] == 2
    assert figures.get("bert_step_speedup") == (2 if peer == "stock" else None)


def test_losses_are_compared_with_the_first(capsys):
    from tools.bench.training.step import _are_same

    assert _are_same({"ours": [2.0, 1.0], "stock": [2.0, 1.0005]}, 1e-3)
    assert not _are_same({"ours": [2.0, 1.0], "stock": [2.0, 1.1]}, 1e-3)
    assert "differ by more than 0.001" in capsys.readouterr().out
    assert not _are_same({"ours": [2.0], "stock": [float("nan")]}, 1e-3)
