"""What a run writes and prints: on the coordinator's rank, and nothing on the others."""

from dataclasses import dataclass
from typing import Any

from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import Console, MetricRow, MetricsLog
from lag_megatron.run.wandb_logger import Wandb


@dataclass(frozen=True, slots=True)
class RunLogs:
    """The journal, the metrics, their W&B runs and the console."""

    journal: Journal
    metrics: MetricsLog
    wandb: Wandb
    console: Console


class Recorder:
    """Writes on the coordinator and does nothing elsewhere, so that all ranks run the same code.

    Args:
        logs: on the coordinator; None on the other ranks.
    """

    def __init__(self, logs: RunLogs | None) -> None:
        self._logs = logs

    @property
    def logs(self) -> RunLogs:
        """The logs, for work that only the coordinator does."""
        assert self._logs is not None, "only the coordinator has logs"
        return self._logs

    def print(self, text: str) -> None:
        """Print a line."""
        if self._logs is not None:
            self._logs.console.print(text)

    def log_metrics(self, *rows: MetricRow) -> None:
        """Append metrics to metrics.jsonl and send them to W&B."""
        if self._logs is not None:
            self._logs.metrics.append(*rows)
            for row in rows:
                self._logs.wandb.log(row)

    def log_event(self, event: str, *, once: dict[str, Any], **fields: Any) -> None:
        """Append to the journal, unless it has this event with the same ``once`` fields already."""
        if self._logs is not None and self._logs.journal.find(event, **once) is None:
            self._logs.journal.append(event, **once, **fields)

    def flush_metrics(self) -> None:
        """Bring the metrics to disk: called before a checkpoint, which must not outlive them."""
        if self._logs is not None:
            self._logs.metrics.flush_to_disk()
