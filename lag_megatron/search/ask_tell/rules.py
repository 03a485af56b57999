"""The rules of a search by ask and tell, which become the ``growth`` settings of its event."""

from dataclasses import asdict, dataclass
from typing import Literal

from lag_megatron.config import GrowthConfig, parse_growth
from lag_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Lag:
    """Train every candidate to the lag and take the one with the lowest loss there.

    Attributes:
        lag: optimizer steps after growth; ``auto`` ends at twice the phase transition, which is
            looked for at the rungs.
        rungs: for ``auto`` alone, steps after growth in rising order, at least three.
        eval_steps: more steps after growth at which losses are wanted.
        max_loss: a candidate with a larger loss, in nats, has lost.
    """

    lag: int | Literal["auto"]
    rungs: tuple[int, ...] = ()
    eval_steps: tuple[int, ...] = ()
    max_loss: float = 20.0

    def settings(self) -> GrowthConfig:
        """The rule as settings of a growth event.

        Raises:
            ConfigError: with every mistake in it.
        """
        return parse_growth({"rule": "lag", **asdict(self)}, source="Lag()")


@dataclass(frozen=True, kw_only=True, slots=True)
class Halving:
    """Let the best ``1 / eta`` of the candidates go on from each rung, and decide at the lag.

    Attributes:
        lag: optimizer steps after growth; ``auto`` ends at twice the phase transition.
        rungs: steps after growth in rising order, the last one the lag; none takes a quarter and
            a half of the lag.
        eta: the part of the candidates that goes on is one in ``eta``, rounded up.
        min_rank_correlation: nobody is stopped at a rung where the rankings at 0.8 of it and at it
            correlate less; None is 0.4, and 0.8 for the lag ``auto``; -1 stops always.
        rung_value: what candidates are compared by: the loss at the rung, or the mean of those in
            the second half before it.
        eval_steps: more steps after growth at which losses are wanted.
        max_loss: a candidate with a larger loss, in nats, has lost.
    """

    lag: int | Literal["auto"]
    rungs: tuple[int, ...] = ()
    eta: int = 3
    min_rank_correlation: float | None = None
    rung_value: Literal["last", "mean"] = "mean"
    eval_steps: tuple[int, ...] = ()
    max_loss: float = 20.0

    def settings(self) -> GrowthConfig:
        """The rule as settings of a growth event.

        Raises:
            ConfigError: with every mistake in it.
        """
        if self.rung_value not in ("last", "mean"):
            raise ConfigError(
                f"Halving(): rung_value must be 'last' or 'mean' (got {self.rung_value!r}): losses "
                "of averaged weights are not asked for."
            )
        return parse_growth({"rule": "halving", **asdict(self)}, source="Halving()")
