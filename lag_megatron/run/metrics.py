"""Metrics of a run: lines of metrics.jsonl, and lines on the console."""

import json
import sys
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import append_lines, flush_to_disk, write_file
from lag_megatron.errors import RunError, printable
from lag_megatron.process.output import print_at_once
from lag_megatron.run.directory import DAMAGED_RUN
from lag_megatron.run.json_schema import require_schema
from lag_megatron.run.record_schema import MetricsRow
from lag_megatron.small_files import read_json_lines

MetricRow = dict[str, float | int | str]


def validation_row(step: int, *, tokens: int, stage: int, loss: float) -> MetricRow:
    """The line of an evaluation after ``step`` steps and ``tokens`` tokens of the run."""
    return {"step": step, "tokens": tokens, "stage": stage, "val/loss": loss}


class MetricsLog:
    """A file of metrics, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, *rows: MetricRow) -> None:
        """Add lines, all or none.

        Raises:
            RunError: if they cannot be written.
        """
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        append_lines(self._path, text)

    def rows(self) -> list[dict[str, Any]]:
        """All lines."""
        return read_rows(self._path)

    def last(self, key: str) -> float:
        """The newest value of a metric.

        Raises:
            RunError: if there is none.
        """
        for row in reversed(read_rows(self._path)):
            if key in row:
                return float(row[key])
        raise RunError(f"{self._path}: expected a line with {key}, but none has it. {DAMAGED_RUN}")

    def flush_to_disk(self) -> None:
        """Make the lines survive a power cut; done before each checkpoint."""
        if self._path.exists():
            flush_to_disk(self._path)

    def drop_after(self, step: int) -> None:
        """Remove the lines of steps that a resumed run takes again, and a torn last line."""
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        write_file(self._path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path, schema: Any = MetricsRow) -> list[dict[str, Any]]:
    """All lines of a file of metrics; none if it does not exist, without one that a kill tore.

    Args:
        path: of the file.
        schema: the members of a line.

    Raises:
        RunError: if any other line is not such an object.
    """
    what = "a run's metrics"

    def check(line: dict[str, Any], where: str) -> None:
        each = f"a line of {what}"
        require_schema(line, schema, where=where, what=each, error=RunError, advice=DAMAGED_RUN)

    return read_json_lines(path, what=what, error=RunError, advice=DAMAGED_RUN, check=check)


class Console:
    """Lines on standard output and standard error, as long as somebody reads them."""

    def print(self, text: str) -> None:
        """Print one line at once."""
        print_at_once(printable(text), sys.stdout)

    def warn(self, text: str) -> None:
        """Print one line to standard error."""
        print_at_once(printable(text), sys.stderr)

    def step(self, row: MetricRow, *, total_steps: int, mfu: float | None) -> None:
        """The line of a training step."""
        parts = [
            f"stage {row['stage']}  step {row['step']:>6}/{total_steps}",
            f"tokens {row['tokens']:>11,}",
            f"loss {row['train/loss']:7.4f}",
        ]
        if "train/grad_norm" in row:
            parts.append(f"grad norm {row['train/grad_norm']:6.3f}")
        parts.append(f"lr {row['train/lr']:.2e}")
        parts.append(f"{row['train/tokens_per_second']:>9,.0f} tokens/s")
        if mfu is not None:
            parts.append(f"MFU {mfu:5.1%}")
        self.print("  ".join(parts))
