"""What a run measures: metrics.jsonl as the record, a console line, and W&B as a mirror."""

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lag_megatron.config import TrackingConfig
from lag_megatron.files import flush_to_disk, write_atomically

Row = Mapping[str, float | int | str]


class MetricsLog:
    """Lines of metrics, appended; later lines of a repeated step are never needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, *rows: Row) -> None:
        """Add lines."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows)

    def last(self, key: str) -> float:
        """The newest value of a metric.

        Raises:
            KeyError: if there is none.
        """
        for row in reversed(read_rows(self._path)):
            if key in row:
                return float(row[key])
        raise KeyError(key)

    def flush_to_disk(self) -> None:
        """Make the lines survive a power cut; done before each checkpoint."""
        if self._path.exists():
            flush_to_disk(self._path)

    def drop_after(self, step: int) -> None:
        """Remove the lines of steps that a resumed run takes again, and a torn last line."""
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file; none if it does not exist."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # torn by a kill; nothing after it is whole
    return rows


class Console:
    """Lines for the person who watches."""

    def say(self, text: str) -> None:
        """Print one line at once."""
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print one line to standard error."""
        print(text, file=sys.stderr, flush=True)

    def step(self, row: Row, *, total_steps: int, mfu: float | None) -> None:
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
        self.say("  ".join(parts))


class Wandb:
    """One W&B run beside the run directory; its failure never stops training."""

    def __init__(
        self, tracking: TrackingConfig, *, folder: Path, config: Any, console: Console
    ) -> None:
        self._console = console
        self._run: Any = None
        mode = _mode(tracking.wandb.mode)
        if mode == "disabled":
            return
        import wandb

        def begin() -> None:
            self._run = wandb.init(
                project=tracking.wandb.project,
                name=folder.name,
                group=folder.name,
                job_type="train",
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=config,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(console="off", silent=True),
            )
            self._define()

        self._guarded(begin)
        if mode == "offline" and self._run is not None:
            console.say(
                f"W&B is offline (no API key). To upload later: wandb sync {folder}/wandb/offline-*"
            )

    def log(self, row: Row) -> None:
        """Mirror one row; ``tokens`` is the x-axis."""
        if self._run is not None:
            self._guarded(lambda: self._run.log(dict(row)))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary."""
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(dict(values)))

    def finish(self, *, exit_code: int) -> None:
        """Close the run."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=exit_code))

    def _guarded(self, action: Callable[[], object]) -> None:
        import wandb

        try:
            action()
        except (wandb.Error, OSError, RuntimeError, ValueError, TypeError) as error:
            self._run = None
            self._console.warn(f"W&B failed and is off for this run: {error}")

    def _define(self) -> None:
        self._run.define_metric("tokens")
        self._run.define_metric("train/*", step_metric="tokens")
        self._run.define_metric("val/*", step_metric="tokens")


def _mode(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    netrc = Path.home() / ".netrc"
    has_key = "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
    )
    return "online" if has_key else "offline"


def _run_id(folder: Path) -> str:
    """The id of this run directory's W&B run, kept so that a resumed run joins it."""
    path = folder / "wandb_id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text().strip()
