"""Scoring every candidate of a growth event whose checkpoint was kept."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from lag_megatron.atomic_io import write_file
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import RunError
from lag_megatron.evaluation.harness import SCORES
from lag_megatron.evaluation.task_data import Json
from lag_megatron.small_files import read_json

SCORES_FILE = "scores.json"


def candidate_checkpoints(run: Path) -> list[Path]:
    """The newest committed state of each candidate of each event, in order.

    Raises:
        RunError: if there is none: only exhaustive searches keep more than the winner's.
    """
    found = list(_kept(run))
    if not found:
        raise RunError(
            f"{run}: no candidate's state was kept. A run with growth.exhaustive: true keeps them."
        )
    return found


def score_candidates(run: Path, evaluate: Callable[[Path], Json]) -> Iterator[tuple[str, Json]]:
    """Evaluate each candidate's state and write its scores, where the report looks for them.

    Scores of other tasks that are there already stay.

    Yields:
        ``growthNN/<id>`` and the results of ``evaluate`` on its state, each after it is written.
    """
    for state in candidate_checkpoints(run):
        results = evaluate(state)
        scores = {task: r["metrics"][SCORES[task]]["value"] for task, r in results.items()}
        file = state.parent / SCORES_FILE
        before = {}
        if file.exists():
            before = read_json(
                file, what="a candidate's scores", error=RunError, advice="Remove it."
            )
        write_file(file, json.dumps({**before, **scores}, indent=1))
        yield str(state.parent.relative_to(run)), results


def _kept(run: Path) -> Iterator[Path]:
    for folder in sorted(path for path in run.glob("growth*/*") if path.is_dir()):
        if tags := manifest.committed_tags(folder):
            yield tags[-1]
