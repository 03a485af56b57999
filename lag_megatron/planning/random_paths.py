"""Which layers run in a step of Random Path Training: a pure function of (seed, step).

All ranks draw the same path, micro-batches and recomputed layers use the same one, and checkpoints
hold no random state.    Panigrahi et al. 2024 (arXiv 2402.05913), section 3.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.raptr import Lengths, PathRule, fixed_layers, path_rules
from lag_megatron.config.schema.stage_schedule import stage_ranges

_CHUNK_STEPS = 1 << 14
# Constants of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators", section 5; the finalizer is Stafford's variant 13).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


@dataclass(frozen=True, slots=True)
class LayerPath:
    """The layers that run in a step, of a model of ``num_layers``.

    Attributes:
        layers: 0-based and rising.
        branch_scale: what their attention and MLP outputs are multiplied with.
    """

    layers: tuple[int, ...]
    num_layers: int
    branch_scale: float

    @property
    def skipped(self) -> frozenset[int]:
        """The layers that do not run."""
        return frozenset(range(self.num_layers)) - frozenset(self.layers)


def path_at(step: int, config: RunConfig) -> LayerPath | None:
    """The path of the optimizer step with 0-based index ``step`` of the whole run.

    None where all layers run, as they do in stages without paths.
    """
    here = ((stage, rule) for stage, part, rule in path_parts(config) if step in part)
    stage, rule = next(here, (0, None))
    if rule is None:
        return None
    num_layers = config.layers_of(stage)
    (runs,) = _draw(config, rule, range(step, step + 1), num_layers)
    layers = tuple(int(layer) for layer in np.flatnonzero(runs))
    if len(layers) == num_layers:
        return None
    return LayerPath(layers, num_layers, _scale(config, num_layers / len(layers)))


def layers_run(config: RunConfig, steps: range) -> Counter[int]:
    """Number of layers that run -> how many of these steps of the run (0-based) have it."""
    found: Counter[int] = Counter()
    for stage, part, rule in path_parts(config):
        here = range(max(steps.start, part.start), min(steps.stop, part.stop))
        if not here:
            continue
        num_layers = config.layers_of(stage)
        if rule is None:
            found[num_layers] += len(here)
        elif rule.length is not None:
            found[rule.length] += len(here)
        else:
            found += _counts(config, rule, here, num_layers)
    return found


def _counts(config: RunConfig, rule: PathRule, steps: range, num_layers: int) -> Counter[int]:
    """As :func:`layers_run`, for a rule by probability."""
    found: Counter[int] = Counter()
    for start in range(steps.start, steps.stop, _CHUNK_STEPS):
        chunk = range(start, min(start + _CHUNK_STEPS, steps.stop))
        found.update(_draw(config, rule, chunk, num_layers).sum(axis=1).tolist())
    return found


def mean_layers_run(config: RunConfig, steps: range) -> float:
    """Layers that these steps run, on average over them; there is at least one step."""
    counts = layers_run(config, steps)
    return sum(layers * count for layers, count in counts.items()) / counts.total()


def with_path_length(config: RunConfig, stage: int, length: Lengths | None) -> RunConfig:
    """``config`` with paths of a candidate's length in a stage; None leaves them as they are."""
    if length is None:
        return config
    stages = list(config.stages)
    stages[stage] = replace(stages[stage], path_length=length, keep_probability=None)
    return replace(config, stages=tuple(stages))


def with_longest_paths(config: RunConfig) -> RunConfig:
    """``config`` as if of the paths that candidates have, the costliest always won."""
    for stage, steps in enumerate(stage_ranges(config.stages)):
        lengths = config.growth_before(stage).pool.path_length if config.has_event(stage) else ()
        if lengths:
            tried = [with_path_length(config, stage, length) for length in lengths]
            config = max(tried, key=lambda one: mean_layers_run(one, steps))
    return config


def path_parts(config: RunConfig) -> Iterator[tuple[int, range, PathRule | None]]:
    """The parts of all stages: number of the stage, steps of the run, rule; None is all layers."""
    for number, (stage, steps) in enumerate(
        zip(config.stages, stage_ranges(config.stages), strict=True)
    ):
        rules = path_rules(stage.steps, stage.path_length, stage.keep_probability)
        for part, rule in rules:
            yield number, range(steps.start + part.start, steps.start + part.stop), rule


def _scale(config: RunConfig, ratio: float) -> float:
    kind = config.raptr.scale
    return 1.0 if kind == "none" else ratio if kind == "linear" else math.sqrt(ratio)


def _draw(config: RunConfig, rule: PathRule, steps: range, num_layers: int) -> NDArray[np.bool_]:
    """Whether each layer runs in each step, shape (steps, layers)."""
    fixed = list(fixed_layers(config.raptr.fixed, num_layers))
    free = [layer for layer in range(num_layers) if layer not in fixed]
    runs = np.zeros((len(steps), num_layers), dtype=np.bool_)
    runs[:, fixed] = True
    bits = _bits(config.seed, steps, num_layers)[:, free]
    if rule.length is not None:  # those with the smallest numbers: uniform among the free ones
        wanted = rule.length - len(fixed)
        chosen = np.argsort(bits, axis=1, kind="stable")[:, :wanted]
        np.put_along_axis(runs, np.asarray(free, dtype=np.intp)[chosen], True, axis=1)
    else:
        assert rule.probability is not None
        runs[:, free] = (bits >> np.uint64(11)) * 2.0**-53 < rule.probability
    return runs


def _bits(seed: int, steps: range, num_layers: int) -> NDArray[np.uint64]:
    """64 random bits for each step and layer, the same with every version of numpy."""
    key = _mixed(np.full((1, 1), seed & (2**64 - 1), dtype=np.uint64))
    by_step = _mixed(key + np.arange(steps.start, steps.stop, dtype=np.uint64)[:, None] * _GOLDEN)
    return _mixed(by_step + np.arange(1, num_layers + 1, dtype=np.uint64) * _GOLDEN)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> np.uint64(31))
