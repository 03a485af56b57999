"""The scaling law by which Staged Training plans its stages (Shen et al. 2022, arXiv 2203.06211).

Losses are in nats a token, sizes in parameters without embeddings, steps in optimizer steps at the
critical batch size, compute in floating-point operations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lag_megatron.errors import ConfigError, PlanError

# The grid and the smoothing of Staged Training's notebook, remove_oracle.ipynb.
GRID_STEPS = range(4000, 90_000, 10)
GRID_WINDOW = 5

Value = TypeVar("Value", float, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLaw:
    """Loss and compute by size and step (Kaplan et al. 2020, arXiv 2001.08361, section 5).

    ``L(N, S) = (n_c / N)^alpha_n + (step_factor s_c / S)^alpha_s``, ``B_crit(L) = b_star /
    L^(1 / alpha_b)`` and ``C(N, S) = 6 N B_crit S``.  The defaults are Staged Training's.

    Attributes:
        n_c: parameters.
        s_c: steps.
        b_star: tokens.
        alpha_n: exponent of size.
        alpha_s: exponent of steps.
        alpha_b: exponent of the critical batch.
        step_factor: S / S_min = 1 + B_crit / B, which is 2 at the critical batch.

    Raises:
        ConfigError: a constant is not a finite number above 0.
    """

    n_c: float = 8.8e13
    s_c: float = 2.1e3
    b_star: float = 2.1e8
    alpha_n: float = 0.076
    alpha_s: float = 0.76
    alpha_b: float = 0.21
    step_factor: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"scaling law: {field.name} = {value}, expected a finite number above 0."
                )

    @property
    def steepest_slope(self) -> float:
        """What d log L / d log C is at the start of training; it rises from there to 0."""
        return -1 / (1 / self.alpha_s + 1 / self.alpha_b)

    @property
    def frontier_slope(self) -> float:
        """d log L / d log C where the size is the best for the compute spent.

        The curve of one size touches the best of all sizes there, so that this is also the
        exponent of the loss by compute (Kaplan et al. 2020, section 6): minimising N S at fixed L
        gives shares of the loss of ``alpha_s`` (size) to ``alpha_n`` (steps).
        """
        return -1 / (1 / self.alpha_n + 1 / self.alpha_s + 1 / self.alpha_b)

    def floor(self, parameters: float) -> float:
        """The loss that a size approaches."""
        return float((self.n_c / parameters) ** self.alpha_n)

    def loss(self, parameters: float, step: Value) -> Value:
        """The loss of a size after ``step`` steps."""
        above: Value = (self.step_factor * self.s_c / step) ** self.alpha_s
        return self.floor(parameters) + above

    def critical_batch(self, loss: Value) -> Value:
        """The critical batch size at a loss, in tokens."""
        batch: Value = self.b_star / loss ** (1 / self.alpha_b)
        return batch

    def compute(self, parameters: float, step: Value) -> Value:
        """The compute that ``step`` steps take, all at the batch that is critical at their end."""
        return 6 * parameters * self.critical_batch(self.loss(parameters, step)) * step

    def slope(self, parameters: float, step: Value) -> Value:
        """d log L / d log C of one size, below 0.

        With r the part of the loss that steps still lower, d log L / d log S = -alpha_s r, and
        log C = log S - log L / alpha_b + a constant.
        """
        total = self.loss(parameters, step)
        per_step = -self.alpha_s * (total - self.floor(parameters)) / total
        return per_step / (1 - per_step / self.alpha_b)

    def step_at_slope(self, parameters: float, slope: float) -> float:
        """The step at which a size's slope has risen to ``slope``.

        Raises:
            PlanError: the law has no such slope.
        """
        share = self._share_of_steps(slope)
        above = self.floor(parameters) * share / (1 - share)
        return self.step_factor * self.s_c * float(above ** (-1 / self.alpha_s))

    def step_at_loss(self, parameters: float, loss: float) -> float:
        """The step at which a size reaches ``loss``.

        Raises:
            PlanError: it never does.
        """
        above = loss - self.floor(parameters)
        if not above > 0:
            raise PlanError(
                f"{parameters:.3g} parameters never reach a loss of {loss:.4g}: the law's floor "
                f"for them is {self.floor(parameters):.4g}. Ask for a loss above it."
            )
        return self.step_factor * self.s_c * float(above ** (-1 / self.alpha_s))

    def growth_ratio(self, growth: float, slope: float) -> float:
        """Staged Training's rho: steps of the small model over those of the large at one loss.

        It depends neither on the size nor on where the loss is, only on ``growth``, which is how
        many times as many parameters the large model has, and on the small one's slope.

        Raises:
            PlanError: the law has no such slope, or nothing grows.
        """
        if not 1 < growth < math.inf:
            raise PlanError(f"growth by a factor of {growth:.4g} parameters: expected above 1.")
        share = self._share_of_steps(slope)
        share_when_grown = 1 - (1 - share) * growth**-self.alpha_n
        return float((share_when_grown / share) ** (1 / self.alpha_s))

    def saving(self, growth: float, slope: float, *, optimal: float, ratio: float = 0.0) -> float:
        """The share of compute saved by growing once, against the large model from scratch.

        Both train until the large model's slope is ``optimal``.  It does not depend on the size.

        Args:
            growth: how many times as many parameters the large model has.
            slope: the small model's, at which it grows.
            optimal: the large model's, at which it ends.
            ratio: rho; 0 takes the law's.
        """
        end = self.step_at_slope(growth, optimal)
        grown = self.step_at_slope(1.0, slope)
        entered = grown / (ratio or self.growth_ratio(growth, slope))
        saved = self.compute(growth, entered) - self.compute(1.0, grown)
        return saved / self.compute(growth, end)

    def best_growth_slope(self, growth: float) -> float:
        """The slope at which growing by ``growth`` saves the most compute."""
        from scipy.optimize import minimize_scalar

        steepest, optimal = self.steepest_slope, self.frontier_slope
        found = minimize_scalar(
            lambda share: -self.saving(growth, share * steepest, optimal=optimal),
            bounds=(1e-3, 1 - 1e-6),
            method="bounded",
            options={"xatol": 1e-10},
        )
        return float(found.x) * steepest

    def _share_of_steps(self, slope: float) -> float:
        """The part of the loss that steps still lower where the slope is ``slope``."""
        if not self.steepest_slope < slope < 0:
            raise PlanError(
                f"slope {slope}: under this law the slope of log loss over log compute rises from "
                f"{self.steepest_slope:.4f} to 0. Choose a threshold between these."
            )
        return -slope / (self.alpha_s * (1 + slope / self.alpha_b))


def step_on_grid(
    law: ScalingLaw,
    parameters: float,
    slope: float,
    *,
    steps: Sequence[int] = GRID_STEPS,
    window: int = GRID_WINDOW,
) -> int:
    """``step_at_slope`` as Staged Training's notebook finds it.

    Log losses are averaged over ``window`` points, slopes are differences of neighbours, and the
    first above ``slope`` at or after the steepest counts.  Only whole windows do: the notebook's
    reflect the curve at its ends, which flattens it there.

    Raises:
        PlanError: none is, on these steps.
    """
    at = np.asarray(steps, dtype=np.float64)
    smooth = np.convolve(np.log10(law.loss(parameters, at)), np.full(window, 1 / window), "valid")
    inner = slice((window - 1) // 2, (window - 1) // 2 + len(smooth))
    found = np.diff(smooth) / np.diff(np.log10(law.compute(parameters, at[inner])))
    start = int(found.argmin())
    above = np.flatnonzero(found[start:] > slope)
    if not above.size:
        raise PlanError(
            f"slope {slope}: {parameters:.3g} parameters do not reach it within {steps[-1]:,} "
            f"steps. Choose a steeper threshold or a longer grid."
        )
    return steps[inner][start + int(above[0])]


def ratio_on_grid(
    law: ScalingLaw,
    parameters: float,
    growth: float,
    slope: float,
    *,
    steps: Sequence[int] = GRID_STEPS,
) -> float:
    """``growth_ratio`` as Staged Training's notebook finds it: at the grid's nearest loss.

    ``parameters`` are the small model's.
    """
    grown = step_on_grid(law, parameters, slope, steps=steps)
    at = np.asarray(steps, dtype=np.float64)
    distance = np.abs(law.loss(parameters * growth, at) - law.loss(parameters, float(grown)))
    return grown / steps[int(distance.argmin())]


def learning_rate(
    parameters: float,
    *,
    intercept: float = 0.003239,
    per_log: float = -0.0001395,
    log_base: float = 10.0,
) -> float:
    """``intercept + per_log log(parameters)`` (Kaplan et al. 2020, appendix D.6).

    Staged Training's rates are those of the logarithm to base 10; with the natural one
    (``log_base=math.e``) they are a third to a fifth of them.

    Raises:
        PlanError: the formula gives no rate above 0 for this size.
    """
    rate = intercept + per_log * math.log(parameters) / math.log(log_base)
    if not rate > 0:
        raise PlanError(
            f"the formula gives {parameters:.3g} parameters a learning rate of {rate:.3g} with the "
            f"logarithm to base {log_base:.4g}. Use base 10, or set a rate by hand."
        )
    return rate
