"""The W&B runs of one training run; called by the logger's thread alone.

A resumed run joins its W&B runs by the ids in ``wandb_ids.json``.  Of the steps that it takes again
W&B keeps what it has (they are equal).  Offline, W&B cannot see what it has: each start adds a
folder under the same id, ``wandb sync`` joins them in order, and steps taken again are in both.
"""

import json
import os
import re
import secrets
import shlex
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import write_file
from lag_megatron.errors import RunError
from lag_megatron.run.metrics import Console
from lag_megatron.run.wandb_environment import WandbPlaces
from lag_megatron.run.wandb_failure import require_writable
from lag_megatron.small_files import read_json

IDS = "wandb_ids.json"
_UPLOAD_SECONDS = 45.0  # less than the logger waits for at the end
# Facts about the machine and its load are in the stage's run; a probe's run has metrics alone.
_PROBE_SETTINGS = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


class WandbRuns:
    """The W&B runs of a group; its methods block, and raise whatever W&B raises."""

    def __init__(
        self, places: WandbPlaces, folder: Path, config: Mapping[str, Any], console: Console
    ) -> None:
        self._places, self._folder = places, folder
        self._config, self._console = config, console
        self._key = ""  # of the open stage run
        self._run: Any = None
        self._step = 0  # below which W&B takes nothing more for that run
        self._early: dict[str, Any] = {}

    def log(self, row: dict[str, Any]) -> None:
        """Add a line of metrics to its stage's run, unless W&B has later steps."""
        self._enter(int(row["stage"]))
        if row["step"] >= self._step:
            self._step = row["step"]
            self._run.log(row, step=self._step)

    def probe(
        self, growth: int, candidate: str, rows: list[dict[str, Any]], summary: dict[str, Any]
    ) -> None:
        """Open the run of a candidate, add what is new, and close it."""
        about = {"growth": growth, "candidate": candidate}
        run = self._open(f"{_prefix(growth)}/{candidate}", "probe", {"probe": about})
        known = run.step
        for row in rows:
            step = row.pop("step")
            if step >= known:
                run.log({**row, "probe/step": step}, step=step)
        run.summary.update(summary)
        self._close(run, exit_code=0)

    def event(
        self,
        growth: int,
        *,
        columns: list[str],
        rows: list[list[Any]],
        curves: dict[str, list[tuple[int, float]]],
        images: Callable[[], Mapping[str, Path]],
        files: list[Path],
        summary: dict[str, Any],
    ) -> None:
        """Show a growth event in the run of the stage that it begins."""
        import wandb

        self._enter(growth)
        prefix = _prefix(growth)
        table = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        shown: dict[str, Any] = {f"{prefix}/candidates": table}
        if curves:
            shown[f"{prefix}/curves"] = wandb.plot.line_series(
                [[step for step, _ in points] for points in curves.values()],
                [[loss for _, loss in points] for points in curves.values()],
                keys=list(curves),
                title=f"Growth {growth}: validation loss of the candidates",
                xname="steps after growth",
            )
        shown |= {f"{prefix}/{name}": wandb.Image(str(path)) for name, path in images().items()}
        self._run.log(shown, step=self._step)
        self._run.summary.update(summary)
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self._folder.name}-{prefix}")
        artifact = wandb.Artifact(name, type="growth")
        for path in files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def summary(self, values: dict[str, Any]) -> None:
        """Set summary values of the stage's run, or of the next one if none is open."""
        if self._run is None:
            self._early |= values
        else:
            self._run.summary.update(values)

    def finish(self, exit_code: int) -> None:
        """Close the stage's run."""
        if self._run is not None:
            self._close(self._run, exit_code=exit_code)
            self._run = None

    def _enter(self, stage: int) -> None:
        key = f"stage{stage:02d}"
        if self._run is not None and key == self._key:
            return
        self.finish(0)
        self._key, self._run = key, self._open(key, "stage", {"stage": stage})
        self._step = self._run.step
        self._run.summary.update(self._early)
        self._early = {}

    def _open(self, key: str, job_type: str, about: dict[str, Any]) -> Any:
        import wandb

        wanted = {
            "console": "off",
            "silent": True,
            "finish_timeout": _UPLOAD_SECONDS,
            "finish_timeout_raises": True,
            "stop_fn": _stop_training,
            **(_PROBE_SETTINGS if job_type == "probe" else {}),
        }
        known = {name: value for name, value in wanted.items() if name in _setting_names()}
        run: Any = wandb.init(
            project=self._places.project,
            group=self._places.group,
            job_type=job_type,
            name=f"{self._places.name}-{key.replace('/', '-')}",
            id=self._identity(key),
            resume="allow",
            reinit="create_new",
            dir=str(self._places.folder),
            config={**self._config, **about},
            mode=self._places.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(**known),
        )
        run.define_metric("tokens")
        for metrics in ("train/*", "val/*"):
            run.define_metric(metrics, step_metric="tokens")
        return run

    def _close(self, run: Any, *, exit_code: int) -> None:
        require_writable(self._places.files)  # W&B's process says nothing of a full disk
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self._console.warn(
                f"W&B did not upload all of {run.name} within {_UPLOAD_SECONDS:.0f} s. "
                f"To upload the rest: wandb sync {shlex.quote(str(Path(run.dir).parent))}"
            )

    def _identity(self, key: str) -> str:
        path = self._folder / IDS
        known: dict[str, str] = {}
        if path.exists():
            known = read_json(
                path,
                what="W&B's names of this run's parts",
                error=RunError,
                advice="Remove it: W&B then shows the rest as new runs.",
            )
        if key not in known:
            known[key] = secrets.token_hex(8)
            write_file(path, json.dumps(known, indent=1))
        return known[key]


def _prefix(growth: int) -> str:
    return f"growth{growth:02d}"


def _setting_names() -> frozenset[str]:
    """The settings that this W&B has; those named ``x_...`` differ between versions."""
    import wandb

    return frozenset(wandb.Settings.model_fields)


def _stop_training() -> None:
    """The stop button of W&B's web page ends a run as a scheduler does: saved, to be resumed."""
    os.kill(os.getpid(), signal.SIGTERM)
