"""What the tests of rules and replays share: two rules, curves by hand, planted transitions."""

from collections.abc import Mapping, Sequence

import numpy as np

from lag_megatron.config import GrowthConfig
from lag_megatron.selection import Evaluation

Curves = dict[str, list[Evaluation]]
UNGUARDED = GrowthConfig(
    rung_value="last", lag=40, rungs=(10, 20, 40), eta=2, min_rank_correlation=-1
)
GUARDED = GrowthConfig(rung_value="last", lag=40, rungs=(20, 40), eta=2, min_rank_correlation=0.8)


def curves_of(steps: Sequence[int], losses: Mapping[str, Sequence[float]]) -> Curves:
    """Curves shorter than ``steps`` end early."""
    return {
        id_: [Evaluation(step, loss) for step, loss in zip(steps, values, strict=False)]
        for id_, values in losses.items()
    }


def planted(
    transition: int, steps: Sequence[int], *, candidates: int = 20, noise: float = 0.15, seed: int
) -> Curves:
    """Before the transition the ranking is the reverse of the one from it on, with noise.

    Losses fall on the way, and are candidate * spread; the paper's early ranking is
    anti-correlated with the late one too.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(candidates)
    curves: Curves = {str(n): [] for n in range(candidates)}
    for step in steps:
        level = 2 + 3 / (1 + step)
        ranks = order if step >= transition else -order
        spread = ranks / candidates + noise * rng.normal(size=candidates)
        for n, value in enumerate(spread):
            curves[str(n)].append(Evaluation(step, level + 0.05 * value))
    return curves
