"""What Staged Training published about its schedule, next to what its scaling law gives.

Shen et al. 2022, arXiv 2203.06211; figures from the paper's repository, allenai/staged-training:
cheatsheet.txt and notebooks/remove_oracle.ipynb.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lag_megatron.planning.staged_training.plan import (
    GROWTH_SLOPES,
    OPTIMAL_SLOPE,
    GrowthKind,
    ModelShape,
)
from lag_megatron.planning.staged_training.scaling_law import (
    ScalingLaw,
    learning_rate,
    ratio_on_grid,
    step_on_grid,
)

BASE, LARGE = ModelShape(12, 768), ModelShape(24, 1536)
# Parameters by which doubling the depth, the width or both multiplies.
FACTORS: dict[GrowthKind, float] = {"depth": 2.0, "width": 4.0, "both": 8.0}
MEASURED_RATIOS: dict[GrowthKind, float] = {"depth": 1.412, "width": 1.776, "both": 2.455}

_LAW_RATIOS: dict[GrowthKind, float] = {"depth": 1.831, "width": 2.717}
_MEASURED_SAVINGS: dict[GrowthKind, tuple[float, float]] = {
    "depth": (0.132, 0.148),
    "width": (0.216, 0.255),
}
# Recomputed by the notebook's procedure; what it printed is not kept.
_GRID_STEPS = {8.5e6: 17_270, 8.5e7: 21_740, 6.8e8: 26_770}
_SAVINGS: dict[GrowthKind, float] = {"depth": 0.066, "width": 0.078}
_RATES = {
    "GPT2_base": (BASE, 0.002132892651963921),
    "GPT2_base_div2_depth": (ModelShape(6, 768), 0.0021748863363590465),
    "GPT2_base_div2_width": (ModelShape(12, 384), 0.002216880020754172),
    "GPT2_large": (LARGE, 0.002006911598778545),
    "GPT2_large_div2_depth": (ModelShape(12, 1536), 0.0020489052831736704),
    "GPT2_large_div2_width": (ModelShape(24, 768), 0.002090898967568796),
}

Reproduction = Literal["reproduced", "not reproduced", "measured"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFigure:
    """One published figure.

    Attributes:
        published: as published, or as recomputed by others with the published procedure.
        law: what this project's law gives.
        verdict: ``measured`` for figures of training runs, which no law has to reproduce.
        note: what explains a difference.
    """

    name: str
    published: float
    law: float
    verdict: Reproduction
    note: str = ""


def halved(target: ModelShape, growth: GrowthKind) -> ModelShape:
    """The small model that doubles into ``target``."""
    layers, hidden = target.num_layers, target.hidden_size
    return ModelShape(
        layers if growth == "width" else layers // 2,
        hidden if growth == "depth" else hidden // 2,
    )


def compare_published(law: ScalingLaw, *, log_base: float = 10.0) -> Iterator[PublishedFigure]:
    """Every published figure that the law can be compared with."""
    yield from _thresholds(law)
    yield from _ratios(law)
    for size, step in _GRID_STEPS.items():
        name = f"S(tau_opt) of {size:.2g} parameters, on the grid"
        yield _compared(name, step, step_on_grid(law, size, OPTIMAL_SLOPE), within=0)
    yield from _savings(law)
    for name, (shape, rate) in _RATES.items():
        computed = learning_rate(shape.parameters, log_base=log_base)
        yield _compared(f"learning rate of {name} ({shape})", rate, computed, within=1e-15)


def _compared(
    name: str, published: float, law: float, *, within: float, note: str = ""
) -> PublishedFigure:
    same = abs(law - published) <= within
    return PublishedFigure(
        name=name,
        published=published,
        law=law,
        verdict="reproduced" if same else "not reproduced",
        note="" if same else note,
    )


def _thresholds(law: ScalingLaw) -> Iterator[PublishedFigure]:
    yield _compared("tau_opt", OPTIMAL_SLOPE, law.frontier_slope, within=5e-4)
    for growth, slope in GROWTH_SLOPES.items():
        factor, best = FACTORS[growth], law.best_growth_slope(FACTORS[growth])
        at, most = (law.saving(factor, s, optimal=OPTIMAL_SLOPE) for s in (slope, best))
        yield _compared(
            f"tau_{growth}",
            slope,
            best,
            within=5e-4,
            note=f"found by hand; the law saves {at:.2%} there and at most {most:.2%}, at its own",
        )


def _ratios(law: ScalingLaw) -> Iterator[PublishedFigure]:
    for growth, ratio in _LAW_RATIOS.items():
        computed = ratio_on_grid(law, 8.5e6, FACTORS[growth], GROWTH_SLOPES[growth])
        name = f"rho_{growth} by the law"
        at_other = ratio_on_grid(law, 8.5e6, FACTORS[growth], GROWTH_SLOPES["width"])
        note = f"the law gives {at_other:.3f} at tau_width" if growth == "depth" else ""
        yield _compared(name, ratio, computed, within=1e-3, note=note)
    for growth, ratio in MEASURED_RATIOS.items():
        computed = law.growth_ratio(FACTORS[growth], GROWTH_SLOPES[growth])
        yield PublishedFigure(
            name=f"rho_{growth} measured", published=ratio, law=computed, verdict="measured"
        )


def _savings(law: ScalingLaw) -> Iterator[PublishedFigure]:
    for growth, saving in _SAVINGS.items():
        computed = law.saving(FACTORS[growth], GROWTH_SLOPES[growth], optimal=OPTIMAL_SLOPE)
        yield _compared(f"saving by {growth}, by the law", saving, computed, within=5e-4)
    for growth, measured in _MEASURED_SAVINGS.items():
        predicted = law.saving(
            FACTORS[growth],
            GROWTH_SLOPES[growth],
            optimal=OPTIMAL_SLOPE,
            ratio=MEASURED_RATIOS[growth],
        )
        for name, saving in zip(("GPT2_base", "GPT2_large"), measured, strict=True):
            yield PublishedFigure(
                name=f"saving by {growth} measured, {name}",
                published=saving,
                law=predicted,
                verdict="measured",
                note="the law's column takes the measured rho",
            )
