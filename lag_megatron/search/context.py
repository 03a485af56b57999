"""What a search is given: how to train, evaluate and stop, what steps cost, where files are.

A search sees no run configuration.  Whoever drives it builds these, from a configuration as
:mod:`lag_megatron.training` does, or from a training program of another kind.
"""

from dataclasses import dataclass
from typing import Protocol

from lag_megatron.engine.protocol import SearchEngine
from lag_megatron.growth.pool import Candidate
from lag_megatron.run.directory import RunDirectory
from lag_megatron.run.metrics import MetricRow
from lag_megatron.run.signals import StopFlag
from lag_megatron.search.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class SearchContext:
    """What a growth event has to know of the run that it belongs to.

    Attributes:
        run: where its files lie.
        stop: set when the run is asked to end.
        costs: of the model that the event grows to.
        checkpoint_interval: optimizer steps between the saved states of a candidate on its way to a
            rung.
        equal_memory: whether no later step needs more device memory than the first ones.
    """

    run: RunDirectory
    stop: StopFlag
    costs: StepCosts
    checkpoint_interval: int
    equal_memory: bool


class ProbeTrainer(Protocol):
    """Trains and evaluates the model in an engine; all ranks of a probe group call together."""

    @property
    def engine(self) -> SearchEngine:
        """Holds the state that is trained; its depth is the one that the event grows to."""

    def train_step(self, candidate: Candidate, step: int) -> tuple[MetricRow, bool]:
        """Take one optimizer step; every candidate sees the same global batch at the same step.

        Args:
            candidate: whose state the engine holds.
            step: 0-based number of the step in the whole run.

        Returns:
            the step's metrics and whether some rank was asked to stop, the same on all ranks.  The
            metrics hold ``step`` (steps taken, so one more), ``train/loss`` in nats per label and,
            where it is known, ``train/grad_norm``.
        """

    def evaluate(self) -> list[float]:
        """Mean loss of each batch of the fixed validation set, in nats per label."""
