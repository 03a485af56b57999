"""A policy of stacking, written as one mapping, becomes the list of stages that it stands for.

``stages: {policy: last, layers: [4, 8, 12], steps: 300000, split: proportional}`` is short for
three stages and two growth events; nothing behind this module knows the short form.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lag_megatron.config.explain import explain
from lag_megatron.config.strict import FORBID

Tree = dict[str, Any]

# Karp et al. 2024, appendix A.3: every index up to the paper's fourth stage, even ones after it.
_STAGES_WITH_ALL_INDICES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StackingConfig:
    """What grows when.

    Attributes:
        policy: ``adaptive``: LAG before every stage, among duplicates, at all places up to the
            fourth stage and at even ones after it (Karp et al. 2024, section 5 and appendix A.3);
            ``last``, ``midas``, ``random_top``, ``progressive`` (which doubles): that operator
            each time; ``g_stack``: one hop between two sizes; ``scratch``: one size, no growth.
        layers: number of layers of each stage, rising; the first is the model's.
        steps: of all stages together, split by ``split``, or of each.
        tokens: the same in tokens.
        split: ``uniform``, or ``proportional``: stage i of K, from 1, gets the share ``i^alpha`` of
            the sum (PROP-alpha of Saunshi et al. 2024, arXiv 2409.19044, section 3).
        alpha: exponent of ``proportional``.
    """

    __pydantic_config__ = FORBID
    policy: Literal["adaptive", "last", "midas", "random_top", "progressive", "g_stack", "scratch"]
    layers: tuple[int, ...]
    steps: int | tuple[int, ...] | None = None
    tokens: int | tuple[int, ...] | None = None
    split: Literal["uniform", "proportional"] = "uniform"
    alpha: float = 1.0


def expand_stages(tree: Tree) -> tuple[Tree, list[str]]:
    """``tree`` with its stages as a list, and what is wrong with their short form."""
    short = tree.get("stages")
    if not isinstance(short, dict):
        return tree, []
    try:
        stacking = TypeAdapter(StackingConfig).validate_python(short)
    except ValidationError as error:
        lines = explain(error, short, schema=StackingConfig)
        return tree, [f"stages.{line}" for line in lines]
    if lines := list(_problems(stacking)):
        return tree, lines
    tree = {**tree, "stages": _stages(stacking)}
    model = tree.get("model")
    if isinstance(model, dict) and "num_layers" not in model:
        tree["model"] = {**model, "num_layers": stacking.layers[0]}
    return tree, []


def shares(total: int, parts: int, *, alpha: float) -> list[int]:
    """``total`` cut into whole parts that grow as ``i^alpha``; they add up to it exactly."""
    weights = [number**alpha for number in range(1, parts + 1)]
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(parts)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _problems(stacking: StackingConfig) -> list[str]:
    layers, found = stacking.layers, []
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1:
        found.append(f"stages.layers: must be positive and strictly rising (got {list(layers)}).")
    exact = {"scratch": 1, "g_stack": 2}.get(stacking.policy)
    if exact is not None and len(layers) != exact:
        found.append(
            f"stages.layers: the policy {stacking.policy!r} has {exact} of them "
            f"(got {list(layers)})."
        )
    if stacking.alpha < 0:
        found.append(f"stages.alpha: must not be negative (got {stacking.alpha}).")
    if (stacking.steps is None) == (stacking.tokens is None):
        found.append("stages: give either steps or tokens, of all stages together or of each.")
        return found
    name = "tokens" if stacking.steps is None else "steps"
    amount = _amount(stacking)
    if isinstance(amount, tuple) and len(amount) != len(layers):
        found.append(
            f"stages.{name}: {len(amount)} numbers for {len(layers)} stages. Give one for each, "
            "or their sum."
        )
    elif isinstance(amount, int) and amount < len(layers):
        found.append(
            f"stages.{name}: {amount} cannot be split among {len(layers)} stages. Give more."
        )
    return found


def _amount(stacking: StackingConfig) -> int | tuple[int, ...]:
    amount = stacking.tokens if stacking.steps is None else stacking.steps
    assert amount is not None  # _problems has seen to it
    return amount


def _stages(stacking: StackingConfig) -> list[Tree]:
    amount = _amount(stacking)
    alpha = stacking.alpha if stacking.split == "proportional" else 0.0
    parts = (
        list(amount)
        if isinstance(amount, tuple)
        else shares(amount, len(stacking.layers), alpha=alpha)
    )
    unit = "tokens" if stacking.steps is None else "steps"
    return [
        {unit: part, "num_layers": layers, **_growth(stacking.policy, number)}
        for number, (part, layers) in enumerate(zip(parts, stacking.layers, strict=True))
    ]


def _growth(policy: str, stage: int) -> Tree:
    """What the policy says of the growth before a stage; the global ``growth`` says the rest."""
    if stage == 0:
        return {}
    if policy != "adaptive":
        return {"growth": {"pool": {"operator": policy, "options": {}}}}
    index = "all" if stage < _STAGES_WITH_ALL_INDICES else "even"
    return {"growth": {"pool": {"operator": "lag", "index": index, "init": ["duplicate"]}}}
