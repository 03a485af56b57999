"""What benches measure: the work, and nothing that is beside it."""

import sys
import time

import pytest
import torch

CPU = torch.device("cpu")


def busy(seconds):
    started = time.process_time()
    while time.process_time() - started < seconds:
        pass


def test_on_a_cpu_only_what_the_process_does_counts():
    from tools.bench.common.timing import medians

    works = {"waits": lambda: time.sleep(0.05), "works": lambda: busy(0.02)}
    found = medians(works, CPU, rounds=3)
    assert found["waits"] < 0.01
    assert 0.02 <= found["works"] < 0.04


def test_what_is_made_ready_is_not_timed():
    from tools.bench.common.timing import medians

    done = []
    found = medians(
        {"a": lambda: done.append("a"), "b": lambda: done.append("b")},
        CPU,
        rounds=1,
        before=lambda: (done.append("-"), busy(0.02)),
    )
    assert "".join(done) == "-a-b" * 3  # two rounds warm up
    assert max(found.values()) < 0.01


@pytest.mark.parametrize("figure", ["gelu_float32_4x8", "residual_dropout_norm_bfloat16_4x8"])
def test_forms_are_compared_as_training_calls_them(figure, tmp_path, monkeypatch):
    """Without a mode that torch asks in each call: it would cost most where tensors are small."""
    from tools.bench.training import elementwise

    kind, modes, passes = figure.removesuffix("_4x8"), [], []

    def medians(works, device, *, rounds, before):
        modes.append(torch.overrides._get_current_function_mode_stack())
        for work in works.values():
            before()
            work()
        passes.append(set(works))
        return {name: 2.0 if name == "torch" else 1.0 for name in works}

    for shapes in ("SHAPES", "NORMED"):
        monkeypatch.setattr(elementwise, shapes, {"cpu": ((4, 8),)})
    monkeypatch.setattr(elementwise, "medians", medians)
    monkeypatch.setattr(elementwise, "_compiled", lambda form: form)
    monkeypatch.setattr(elementwise, "write_figures", lambda file, figures: noted.update(figures))
    noted = {}
    monkeypatch.setattr(sys, "argv", ["elementwise.py", "--json", str(tmp_path / "file")])
    threads = torch.get_num_threads()
    try:
        assert elementwise.main() == 0
    finally:
        torch.set_num_threads(threads)
    assert modes == [[]] * len(passes)
    assert {"one_pass", "torch", "compiled"} in passes
    assert noted[figure] == (1.0 if kind.startswith("gelu") else 2.0)
