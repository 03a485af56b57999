"""What a growth event is, and the messages between its coordinator and its probe workers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lag_megatron.config import GrowthConfig
from lag_megatron.growth.pool import Candidate
from lag_megatron.run.metrics import MetricRow


@dataclass(frozen=True, slots=True)
class GrowthEvent:
    """A growth event: the state it grows, the depth it grows to, and how candidates are judged.

    Attributes:
        number: of the event, and of the stage that follows it.
        base: the checkpoint that all candidates grow from.
        base_step: optimizer steps of the run that it has seen.
        base_val_loss: its validation loss, in nats per token; None if it is not known.
        source_layers: its depth.
        target_layers: depth of every candidate.
        stage_steps: length of the stage that follows, in optimizer steps.
        growth: settings of the event: rule, lag, rungs.
        pool: the candidates.
    """

    number: int
    base: Path
    base_step: int
    base_val_loss: float | None
    source_layers: int
    target_layers: int
    stage_steps: int
    growth: GrowthConfig
    pool: tuple[Candidate, ...]

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps after growth to which candidates are trained one after the other."""
        return (self.stage_steps,) if self.growth.exhaustive else self.growth.rung_steps()

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Steps after growth at which candidates are evaluated."""
        return tuple(sorted({*self.growth.evaluation_steps(), *self.rungs}))

    @property
    def decides_at(self) -> int | None:
        """The rung that is the last one for certain; None while it has to be found."""
        return self.rungs[-1] if self.growth.exhaustive or self.growth.lag != "auto" else None


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a probe group does next.

    Attributes:
        candidate: index in the pool; None when there is nothing left to do.
        rung: the step after growth to train it to.
        trained_steps: steps after growth that it has taken so far.
        attempt: how often this candidate has been started, this time included.
        stop: why all groups end now; empty while they do not.
    """

    candidate: int | None = None
    rung: int = 0
    trained_steps: int = 0
    attempt: int = 0
    stop: str = ""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe group has done with an assignment.

    Attributes:
        candidate: index in the pool.
        rung: the step it was to be trained to.
        steps: optimizer steps that it has taken since growth.
        evaluations: lines of its curve, all from growth on.
        train_rows: metrics of the steps taken now.
        state: name of the saved state in the candidate's folder; None if it cannot win any more.
        failure: why it lost; empty if it did not.
        seconds: wall time that it took now.
    """

    candidate: int
    rung: int
    steps: int
    evaluations: tuple[dict[str, Any], ...] = ()
    train_rows: tuple[MetricRow, ...] = field(default=(), repr=False)
    state: str | None = None
    failure: str = ""
    seconds: float = 0.0
