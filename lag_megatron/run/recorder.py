"""What the coordinator writes and says; the other ranks have a silent one."""

from dataclasses import dataclass
from typing import Any

from lag_megatron.engine.training_context import MetricRow
from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import Console, MetricsLog
from lag_megatron.run.wandb_logger import Wandb


@dataclass(frozen=True, slots=True)
class Books:
    """The journal, the metrics and who watches them."""

    journal: Journal
    metrics: MetricsLog
    wandb: Wandb
    console: Console


class Recorder:
    """Writes on the coordinator and does nothing elsewhere, so that all ranks run one code."""

    def __init__(self, books: Books | None) -> None:
        self._books = books

    @property
    def books(self) -> Books:
        """The coordinator's books, for work that only the coordinator does."""
        assert self._books is not None, "only the coordinator has books"
        return self._books

    def say(self, text: str) -> None:
        """Print a line for the person who watches."""
        if self._books is not None:
            self._books.console.say(text)

    def measured(self, *rows: MetricRow) -> None:
        """Record metrics and mirror them to W&B."""
        if self._books is not None:
            self._books.metrics.append(*rows)
            for row in rows:
                self._books.wandb.log(row)

    def happened(self, event: str, *, once: dict[str, Any], **fields: Any) -> None:
        """Write an event, unless the journal has one with the same ``once`` fields already."""
        if self._books is not None and self._books.journal.find(event, **once) is None:
            self._books.journal.append(event, **once, **fields)

    def about_to_save(self) -> None:
        """Make what was measured outlive a power cut, as the checkpoint that follows will."""
        if self._books is not None:
            self._books.metrics.flush_to_disk()
