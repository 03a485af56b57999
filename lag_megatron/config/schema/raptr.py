"""Random Path Training: which layers run in a step, and how the others are treated."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lag_megatron.config.schema.base import FORBID
from lag_megatron.config.schema.shares import shares

# One value for a whole stage, or several for equal parts of it, one after the other.
Lengths = int | tuple[int, ...]
Probabilities = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RaptrConfig:
    """Settings of all paths (Panigrahi et al. 2024, arXiv 2402.05913, section 3).

    ``stages.N.path_length`` or ``stages.N.keep_probability`` set which stages have paths, and
    their lengths.

    Attributes:
        fixed: layers that run in every step, 0-based, from the top if negative.
        scale: the factor c of the branches of layers that run, with L layers of which n run:
            ``sqrt`` is sqrt(L / n), which under pre-LN keeps the norm of the residual stream at
            initialisation (post-LN norms it anyway); ``linear`` is L / n; ``none`` is 1.
        update_skipped: whether moments and weight decay of the layers that do not run go on with a
            gradient of 0 (``decay``) or stand still (``freeze``).
    """

    __pydantic_config__ = FORBID
    fixed: tuple[int, ...] = (0, -1)
    scale: Literal["none", "sqrt", "linear"] = "sqrt"
    update_skipped: Literal["decay", "freeze"] = "decay"


@dataclass(frozen=True, slots=True)
class PathRule:
    """How many layers run: exactly ``length``, or the fixed ones and others by ``probability``."""

    length: int | None = None
    probability: float | None = None


def path_rules(
    steps: int, length: Lengths | None, probability: Probabilities | None
) -> Iterator[tuple[range, PathRule | None]]:
    """The parts of a stage of ``steps`` steps, counted from its start, with the rule of each."""
    rules: list[PathRule | None]
    if length is not None:
        lengths = length if isinstance(length, tuple) else (length,)
        rules = [PathRule(length=value) for value in lengths]
    elif probability is not None:
        values = probability if isinstance(probability, tuple) else (probability,)
        rules = [PathRule(probability=value) for value in values]
    else:
        rules = [None]
    start = 0
    for rule, part in zip(rules, shares(steps, len(rules), alpha=0.0), strict=True):
        yield range(start, start + part), rule
        start += part


def fixed_layers(fixed: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Numbers, from 0 and rising, of the layers that run in every step."""
    return tuple(sorted({layer % num_layers for layer in fixed}))
