"""Where a grown model's layers came from, and stages that a measured slope ended."""

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import SyntheticRun

from lag_megatron.config import parse_config
from lag_megatron.report import report_data, write_report
from lag_megatron.report.stats.lineage import lineage_data
from lag_megatron.run.resolved_config import as_journalled


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lag_megatron.report.plots_available", lambda: False)


def event(number: int, layers: list[tuple[int, bool, str]]) -> dict:
    entries = [{"source": s, "new": n, "init": i, "scale": 1.0} for s, n, i in layers]
    candidates = [{"id": "other", "layer_map": []}, {"id": "won", "layer_map": entries}]
    return {"growth": number, "chosen": "won", "candidates": candidates}


def test_origins_follow_through_copies_and_fresh_layers() -> None:
    first = event(1, [(0, False, "duplicate"), (0, True, "random"), (1, False, "duplicate")])
    second = event(
        2,
        [(source, new, "duplicate") for source, new in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))],
    )
    models = lineage_data([first, second], first_layers=2)
    last = models[-1]["layers"]
    assert [layer["ancestor"] for layer in last] == [0, None, None, 1, 1]
    assert [layer["born"] for layer in last] == [0, 1, 1, 0, 0]
    assert [layer["kind"] for layer in last] == ["old", "old", "duplicate", "old", "duplicate"]
    assert [layer["source"] for layer in last] == [0, 1, 1, 2, 2]


def test_an_undecided_event_ends_the_history() -> None:
    first = event(1, [(0, False, "duplicate"), (0, True, "duplicate")])
    undecided = {**event(2, []), "chosen": None}
    assert [m["growth"] for m in lineage_data([first, undecided], first_layers=1)] == [0, 1]


def test_ancestors_equal_the_product_of_the_maps(tmp_path: Path) -> None:
    """Independently: rows of 0 and 1, multiplied."""
    pool = {"operator": "lag", "index": "all", "init": ["duplicate"]}
    run = SyntheticRun(tmp_path / "demo", layers=(4, 6, 9), pool=pool)
    run.go_through()
    data = report_data(run.path)
    product = np.eye(4, dtype=int)
    for growth in (1, 2):
        folder = run.path / f"growth{growth:02d}"
        chosen = json.loads((folder / "decision.json").read_text())["chosen"]
        pool_entries = json.loads((folder / "pool.json").read_text())
        (layers,) = [c["layer_map"] for c in pool_entries if c["id"] == chosen]
        step = np.zeros((len(layers), len(product)), dtype=int)
        step[np.arange(len(layers)), [layer["source"] for layer in layers]] = 1
        product = step @ product
    found = [layer["ancestor"] for layer in data["lineage"][-1]["layers"]]
    assert found == product.argmax(axis=1).tolist()
    page = write_report(run.path).read_text()
    assert "Where the layers came from" in page
    assert page.count('aria-label="where each layer came from"') == 1
    names = [str(ancestor + 1) for ancestor in found]
    drawn = (run.path / "report.md").read_text()
    assert " ".join(names) in drawn.replace("*", "").replace("\\", "")


def test_a_stage_cut_by_its_slope_is_as_long_as_it_was(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo", layers=(4, 6))
    run.train(0, until=300)
    run.event("stage_cut", stage=0, step=300, steps=300, slope=-0.05123)
    run.event("stage_finished", stage=0, step=300, val_loss=4.5)
    data = report_data(run.path)
    assert data["total_steps"] == 500
    assert [s["first_step"] for s in data["stages"]] == [0, 300]
    assert data["stages"][0]["ended_at_slope"] == -0.05123
    assert "finished at slope -0.0512" in write_report(run.path).read_text()


def test_cutting_changes_nothing_else() -> None:
    model = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    tree = {
        "model": {**model, "num_query_groups": 2, "seq_length": 4},
        "stages": [{"steps": 9}, {"steps": 5}],
    }
    config = parse_config(tree)
    other = {"event": "checkpoint", "stage": 1, "steps": 1}
    cut = as_journalled(config, [other, {"event": "stage_cut", "stage": 0, "steps": 4}])
    assert [stage.steps for stage in cut.stages] == [4, 5]
    assert as_journalled(config, [other]) == config
