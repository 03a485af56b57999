"""A policy of stages, written as one mapping, becomes the list of stages that it stands for.

``stages: {policy: last, layers: [4, 8, 12], steps: 300000, split: proportional}`` is short for
three stages and two growth events, ``stages: {policy: raptr, layers: [12], paths: [6, 8, 10, 12],
steps: 300000}`` for four stages of one size.  Everything else sees the list of stages alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from lag_megatron.config.schema.base import FORBID, Tree
from lag_megatron.config.schema.ranges import MAX_LAYERS
from lag_megatron.config.schema.raptr import RaptrConfig, fixed_layers
from lag_megatron.config.schema.shares import shares
from lag_megatron.config.validation.messages import describe_errors, truth_value_problems

# Karp et al. 2024, appendix A.3: every index up to the paper's fourth stage, even ones after it.
_STAGES_WITH_ALL_INDICES = 4
_MAX_PATH_STAGES = 100
_MAX_ALPHA = 100  # beyond it the shares of all stages but the last are nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class StackingConfig:
    """The short form of ``stages``: which sizes are trained, for how long, grown by which policy.

    Attributes:
        policy: ``adaptive``: LAG before every stage, among duplicates, at all places up to the
            fourth stage and at even ones after it (Karp et al. 2024, section 5 and appendix A.3);
            ``last``, ``midas``, ``random_top``, ``progressive`` (which doubles): that operator
            each time; ``g_stack``: one hop between two sizes; ``scratch``: one size, no growth;
            ``raptr``: one size, of which random paths are trained that lengthen stage by stage
            (Panigrahi et al. 2024, arXiv 2402.05913).
        layers: number of layers of each stage, rising; the first is the model's.
        steps: of all stages together, split by ``split``, or of each.
        tokens: the same in tokens.
        split: ``uniform``, or ``proportional``: stage i of K, from 1, gets the share ``i^alpha`` of
            the sum (PROP-alpha of Saunshi et al. 2024, arXiv 2409.19044, section 3).
        alpha: exponent of ``proportional``; 0 or more.
        paths: ``raptr``: the path length of each stage.
        flops_share: instead of ``paths``, the share of the layers' FLOPs of all steps that the
            paths may take at most: ``path_stages`` lengths (one, or several that rise evenly to all
            layers), as long as the share allows; in (0, 1].
        path_stages: how many stages ``flops_share`` has; null is 4; 1 or more.
        full_warmup: steps (or tokens) at the beginning, of those above, with all layers; 0
            or more.
    """

    __pydantic_config__ = FORBID
    policy: Literal[
        "adaptive", "last", "midas", "random_top", "progressive", "g_stack", "scratch", "raptr"
    ]
    layers: tuple[int, ...]
    steps: int | tuple[int, ...] | None = None
    tokens: int | tuple[int, ...] | None = None
    split: Literal["uniform", "proportional"] = "uniform"
    alpha: float = 1.0
    paths: tuple[int, ...] = ()
    flops_share: float | None = None
    path_stages: int | None = None
    full_warmup: int = 0

    @property
    def parts(self) -> int:
        """Into how many stages ``steps`` or ``tokens`` are split."""
        if self.policy != "raptr":
            return len(self.layers)
        return len(self.paths) or (4 if self.path_stages is None else self.path_stages)


def expand_stages(tree: Tree) -> tuple[Tree, list[str]]:
    """``tree`` with its stages as a list, and every mistake in their short form."""
    short = tree.get("stages")
    if not isinstance(short, dict):
        return tree, []
    try:
        stacking = TypeAdapter(StackingConfig).validate_python(short)
    except ValidationError as error:
        lines = describe_errors(error, short, schema=StackingConfig)
    else:
        lines = truth_value_problems(short, schema=StackingConfig)
    if lines:
        return tree, [f"stages.{line}" for line in lines]
    least = _least(tree, max(1, *stacking.layers, 1))
    if lines := list(_problems(stacking, least)):
        return tree, lines
    tree = {**tree, "stages": _stages(stacking, least)}
    model = tree.get("model")
    if isinstance(model, dict) and "num_layers" not in model:
        tree["model"] = {**model, "num_layers": stacking.layers[0]}
    return tree, []


def _least(tree: Tree, layers: int) -> int:
    """The shortest path: the number of layers that ``raptr`` fixes, 1 at least."""
    try:
        raptr = TypeAdapter(RaptrConfig).validate_python(tree.get("raptr") or {})
    except ValidationError:  # which is reported with everything else that is wrong
        raptr = RaptrConfig()
    return max(1, len(fixed_layers(raptr.fixed, layers)))


def _problems(stacking: StackingConfig, least: int) -> list[str]:
    layers, found = stacking.layers, []
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
        found.append(f"stages.layers: must be positive and strictly rising (got {list(layers)}).")
    elif layers[-1] > MAX_LAYERS:
        found.append(f"stages.layers: must be at most {MAX_LAYERS:,} (got {layers[-1]:,}).")
    exact = {"scratch": 1, "g_stack": 2, "raptr": 1}.get(stacking.policy)
    if exact is not None and len(layers) != exact:
        found.append(
            f"stages.layers: the policy {stacking.policy!r} has {exact} of them "
            f"(got {list(layers)})."
        )
    if not 0 <= stacking.alpha <= _MAX_ALPHA:
        found.append(f"stages.alpha: must lie between 0 and {_MAX_ALPHA} (got {stacking.alpha}).")
    found += _path_problems(stacking)
    if (stacking.steps is None) == (stacking.tokens is None):
        found.append("stages: give either steps or tokens, of all stages together or of each.")
        return found
    name = "tokens" if stacking.steps is None else "steps"
    amount, parts = _amount(stacking), stacking.parts
    if isinstance(amount, tuple) and len(amount) != parts:
        found.append(
            f"stages.{name}: {len(amount)} numbers for {parts} stages. Give one for each, "
            "or their sum."
        )
    elif isinstance(amount, tuple) and min(amount) < 1:
        found.append(f"stages.{name}: each must be above 0 (got {list(amount)}).")
    elif isinstance(amount, int) and amount - stacking.full_warmup < parts:
        rest = f" after a full_warmup of {stacking.full_warmup}" if stacking.full_warmup else ""
        found.append(
            f"stages.{name}: {amount} cannot be split among {parts} stages{rest}. Give more."
        )
    elif not found and stacking.flops_share is not None and _ramp(stacking, least) is None:
        found.append(
            f"stages.flops_share: {stacking.flops_share} is less than paths that rise to "
            f"{layers[0]} layers in {parts} stages take. Give more, or paths."
        )
    return found


def _path_problems(stacking: StackingConfig) -> list[str]:
    """Mistakes in the settings of paths."""
    share = stacking.flops_share
    if stacking.policy != "raptr":
        given = {
            "paths": stacking.paths or None,
            "flops_share": share,
            "path_stages": stacking.path_stages,
            "full_warmup": stacking.full_warmup or None,
        }
        return [
            f"stages.{name}: is for the policy 'raptr' (got {value} for {stacking.policy!r})."
            for name, value in given.items()
            if value is not None
        ]
    found = []
    if bool(stacking.paths) == (share is not None):
        found.append("stages: the policy 'raptr' needs either paths or flops_share.")
    if share is not None and not 0 < share <= 1:
        found.append(f"stages.flops_share: must be above 0 and at most 1 (got {share}).")
    if stacking.path_stages is not None and share is None:
        found.append(
            f"stages.path_stages: is for flops_share alone (got {stacking.path_stages}). Remove it."
        )
    elif stacking.path_stages is not None and not 1 <= stacking.path_stages <= _MAX_PATH_STAGES:
        found.append(
            f"stages.path_stages: must lie between 1 and {_MAX_PATH_STAGES} "
            f"(got {stacking.path_stages})."
        )
    if stacking.full_warmup < 0:
        found.append(f"stages.full_warmup: must not be negative (got {stacking.full_warmup}).")
    if stacking.full_warmup and isinstance(_either(stacking), tuple):
        found.append(
            "stages.full_warmup: with one number for each stage, give the steps of all together."
        )
    return found


def _ramp(stacking: StackingConfig, least: int) -> tuple[int, ...] | None:
    """The longest lengths from ``least`` within ``flops_share``: one, or rising to all layers."""
    (layers,), parts = stacking.layers, stacking.parts
    lengths_of, amounts = max(parts - 1, 1), _split(stacking)
    assert stacking.flops_share is not None
    allowed = stacking.flops_share * layers * (stacking.full_warmup + sum(amounts))
    for start in range(layers * lengths_of, least * lengths_of - 1, -1):
        rise = layers * lengths_of - start
        lengths = tuple(
            math.floor((start + rise * number / lengths_of) / lengths_of + 0.5)
            for number in range(parts)
        )
        spent = stacking.full_warmup * layers
        spent += sum(length * amount for length, amount in zip(lengths, amounts, strict=True))
        if spent <= allowed:
            return lengths
    return None


def _either(stacking: StackingConfig) -> int | tuple[int, ...] | None:
    return stacking.tokens if stacking.steps is None else stacking.steps


def _amount(stacking: StackingConfig) -> int | tuple[int, ...]:
    amount = _either(stacking)
    assert amount is not None, "checked in _problems"
    return amount


def _split(stacking: StackingConfig) -> list[int]:
    """Steps or tokens of each stage, without the warm-up."""
    amount = _amount(stacking)
    if isinstance(amount, tuple):
        return list(amount)
    alpha = stacking.alpha if stacking.split == "proportional" else 0.0
    return shares(amount - stacking.full_warmup, stacking.parts, alpha=alpha)


def _stages(stacking: StackingConfig, least: int) -> list[Tree]:
    parts = _split(stacking)
    unit = "tokens" if stacking.steps is None else "steps"
    if stacking.policy == "raptr":
        lengths = stacking.paths or _ramp(stacking, least) or ()
        (layers,) = stacking.layers
        whole = [{unit: stacking.full_warmup, "num_layers": layers}] if stacking.full_warmup else []
        return whole + [
            {unit: part, "num_layers": layers, **_path(length, layers)}
            for part, length in zip(parts, lengths, strict=True)
        ]
    return [
        {unit: part, "num_layers": layers, **_growth(stacking.policy, number)}
        for number, (part, layers) in enumerate(zip(parts, stacking.layers, strict=True))
    ]


def _path(length: int, layers: int) -> Tree:
    """Nothing for a path of all layers, whose stage is like any other."""
    return {} if length == layers else {"path_length": length}


def _growth(policy: str, stage: int) -> Tree:
    """The policy's settings of the growth before a stage, laid over the global ``growth``."""
    if stage == 0:
        return {}
    if policy != "adaptive":
        return {"growth": {"pool": {"operator": policy, "options": {}}}}
    index = "all" if stage < _STAGES_WITH_ALL_INDICES else "even"
    return {"growth": {"pool": {"operator": "lag", "index": index, "init": ["duplicate"]}}}
