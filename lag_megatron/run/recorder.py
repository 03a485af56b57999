"""What the coordinator writes and says; the other ranks have a silent one."""

from dataclasses import dataclass
from typing import Any

from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import Console, MetricRow, MetricsLog
from lag_megatron.run.wandb_logger import Wandb


@dataclass(frozen=True, slots=True)
class RunLogs:
    """The journal, the metrics and who watches them."""

    journal: Journal
    metrics: MetricsLog
    wandb: Wandb
    console: Console


class Recorder:
    """Writes on the coordinator and does nothing elsewhere, so that all ranks run one code."""

    def __init__(self, logs: RunLogs | None) -> None:
        self._logs = logs

    @property
    def logs(self) -> RunLogs:
        """The coordinator's logs, for work that only the coordinator does."""
        assert self._logs is not None, "only the coordinator has logs"
        return self._logs

    def print(self, text: str) -> None:
        """Print a line for the person who watches."""
        if self._logs is not None:
            self._logs.console.print(text)

    def log_metrics(self, *rows: MetricRow) -> None:
        """Record metrics and mirror them to W&B."""
        if self._logs is not None:
            self._logs.metrics.append(*rows)
            for row in rows:
                self._logs.wandb.log(row)

    def log_event(self, event: str, *, once: dict[str, Any], **fields: Any) -> None:
        """Write an event, unless the journal has one with the same ``once`` fields already."""
        if self._logs is not None and self._logs.journal.find(event, **once) is None:
            self._logs.journal.append(event, **once, **fields)

    def flush_metrics(self) -> None:
        """Make what was measured outlive a power cut, as the checkpoint that follows will."""
        if self._logs is not None:
            self._logs.metrics.flush_to_disk()
