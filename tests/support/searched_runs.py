"""Runs with a search by hand: one of the paper's pool to the end, one that was halved."""

import json
from pathlib import Path

from synthetic_run import SyntheticRun

STEPS = (0, 5, 8, 10, 16, 20, 32, 40, 100, 200)
POOL = {"operator": "lag", "index": [0, 2, 4, 6, 8], "block_size": "all"}
LAST, RANDOM = "i8-b4-duplicate", "i8-b4-random"


def losses_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of all but the candidate that diverged, read by other means than the report's."""
    found = {}
    for candidate in json.loads((run / "growth01" / "pool.json").read_text()):
        lines = (run / "growth01" / candidate["id"] / "probe.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[candidate["id"]] = [(row["step"], row["val_loss"]) for row in rows]
    del found["i4-b1-random"]
    return found


def exhaustive_run(tmp_path: Path) -> Path:
    """A fixture: the paper's pool of 30, all trained to the end; one candidate diverged."""
    run = SyntheticRun(
        tmp_path / "demo", layers=(12, 16), pool=POOL, exhaustive=True, eval_steps=STEPS
    )
    run.train(0)
    curves = run.curves(1, STEPS)
    curves["i4-b1-random"] = {0: 4.5, 5: 31.0}
    run.start_growth(1)
    entries = [
        run.probe(1, id_, curve, ending="failed" if id_ == "i4-b1-random" else "finished")
        for id_, curve in curves.items()
    ]
    run.decide(1, entries, phase_transition=16)
    run.train(1)
    run.finish()
    scores = {"lambada": 0.0832, "remark": "not a number"}
    (run.path / "growth01" / LAST / "scores.json").write_text(json.dumps(scores))
    return run.path


def halved_run(tmp_path: Path) -> Path:
    """A fixture: twelve candidates; a rung's guard kept all, and the next stopped eight."""
    run = SyntheticRun(tmp_path / "halved", rule="halving")
    run.train(0)
    ids = [candidate.id for candidate in run.start_growth(1)]
    entries = []
    for place, id_ in enumerate(ids):
        curve = {0: 4.5 - place / 100, 10: 4.4, 16: 4.4, 20: 4.3 + place / 100}
        if place < 4:
            entries.append(run.probe(1, id_, {**curve, 32: 4.2, 40: 4.1 + place / 100}))
        else:
            entries.append(run.probe(1, id_, curve, ending="stopped"))
    verdict = {"transition": None, "stopped": []}
    run.decide(
        1,
        entries,
        rung_value="mean",
        phase_transition=15,
        rungs=[
            {**verdict, "rung": 10, "rank_correlation": 0.31, "goes_on": ids},
            {
                "rung": 20,
                "rank_correlation": 0.97,
                "transition": 15,
                "goes_on": ids[:4],
                "stopped": ids[4:],
            },
            {**verdict, "rung": 40, "rank_correlation": 1.0, "goes_on": ids[:4]},
        ],
    )
    return run.path
