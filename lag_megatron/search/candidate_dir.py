"""The files of one candidate: its curve, its training metrics, its saved states, its failures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import append_lines, flush_to_disk, write_file
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.run.directory import step_of, tag_of
from lag_megatron.run.metrics import read_rows
from lag_megatron.run.record_schema import Attempt, CurveRow, Failure, MetricsRow

CURVE = "probe.jsonl"
TRAINING = "train.jsonl"
_FAILED = "failed-rank"
_HUNG = "hung.jsonl"
_MAX_ATTEMPTS = 2


class CandidateDir:
    """``growthNN/<id>``; the leader of the group that trains it writes, the coordinator reads.

    Args:
        path: the folder.
        base_step: optimizer steps of the run before growth; names of saved states include them.
    """

    def __init__(self, path: Path, base_step: int) -> None:
        self.path, self._base_step = path, base_step

    def state_at(self, steps: int) -> Path:
        """Where the state after ``steps`` steps since growth is saved."""
        return self.path / tag_of(self._base_step + steps)

    def curve(self) -> list[dict[str, Any]]:
        """Evaluations, ``step`` counted from growth."""
        return read_rows(self.path / CURVE, CurveRow)

    def training(self) -> list[dict[str, Any]]:
        """Metrics of the steps since growth, ``step`` counted from the run's beginning."""
        return read_rows(self.path / TRAINING)

    def resume(self, *, rung: int, usable: Callable[[Path], bool] = lambda state: True) -> int:
        """Drop what comes after the newest saved state up to ``rung``; its steps, or 0 for none.

        Lines of later steps and unfinished states are removed.

        Args:
            rung: steps after growth.
            usable: whether training can go on from a saved state.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob("step*.tmp"):
            manifest.remove_checkpoint(unfinished)
        states = [
            steps
            for tag in manifest.committed_tags(self.path)
            if (steps := step_of(tag.name) - self._base_step) <= rung and usable(tag)
        ]
        start = max(states, default=0)
        self._truncate(CURVE, start if states else -1)
        self._truncate(TRAINING, self._base_step + start)
        return start

    def add(self, name: str, rows: Sequence[Any]) -> None:
        """Append lines to the curve or to the training metrics, all or none.

        Raises:
            RunError: if they cannot be written.
        """
        append_lines(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def flush(self) -> None:
        """Bring the lines to disk: neither a saved state nor the journal may be ahead of them."""
        for path in (self.path / CURVE, self.path / TRAINING, self.path):
            if path.exists():
                flush_to_disk(path)

    def keep_only(self, state: Path | None) -> None:
        """Delete all saved states but one."""
        for other in self.path.glob("step*"):
            if other != state and other.is_dir():
                manifest.remove_checkpoint(other)

    def mark_failed(self, reason: str, *, rank: int) -> None:
        """Write the reason of a failure that ends this process."""
        write_file(self.path / f"{_FAILED}{rank}.json", json.dumps({"reason": reason}))

    def mark_hung(self, *, attempt: int, seconds: float) -> None:
        """Note that an attempt made no progress for ``seconds``."""
        line = json.dumps({"attempt": attempt, "seconds": seconds})
        append_lines(self.path / _HUNG, line + "\n")

    def failure(self) -> str:
        """Why this candidate must not be tried again, as earlier processes noted; or empty."""
        for path in sorted(self.path.glob(f"{_FAILED}*.json")):
            return str(read_rows(path, Failure)[0]["reason"])
        hung = {row["attempt"]: row["seconds"] for row in read_rows(self.path / _HUNG, Attempt)}
        if len(hung) < _MAX_ATTEMPTS:
            return ""
        return f"no progress for {min(hung.values()):g} s in {len(hung)} attempts; see stacks/"

    def _truncate(self, name: str, last_step: int) -> None:
        rows = read_rows(self.path / name, CurveRow if name == CURVE else MetricsRow)
        kept = [row for row in rows if row["step"] <= last_step]
        if (self.path / name).exists():
            write_file(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))
