"""Weights of a layer that computes nothing because it hears nothing (staged training).

Shen et al. 2022 (arXiv 2203.06211) insert pre-LN layers whose norms have weight and bias 0.  Both
branches then see zeros and, without biases, put out zeros, whatever their matrices are.  The
paper's are identities.  Two things differ here, for a layer has to learn:

- fc1 has more rows than the model has features.  If those beyond the identity were 0, and with them
  the columns of fc2 that read them, neither would ever get a gradient.  So they are drawn, as
  Megatron-Core initialises them; what the MLP computes stays the same.
- A gated MLP multiplies two things that are both 0 behind a silent norm: no gradient would ever
  reach anything in it.  There fc2 is 0 instead, as in LLaMA Pro (Wu et al. 2024, arXiv 2401.02415),
  and the norm is a fresh one beside identities, the source layer's beside copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.tensor_parallel import is_gated
from lag_megatron.errors import PlanError
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Constant, Diagonals, Normal, WeightInit

_QKV, _PROJECTION = ".self_attention.linear_qkv.weight", ".self_attention.linear_proj.weight"
_FC1, _FC2 = ".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight"
_NORMS = (".input_layernorm.weight", ".pre_mlp_layernorm.weight")

_Run = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class IdentityInit:
    """How the new layers of a plan are silenced.

    Attributes:
        gated: whether fc1 holds a gate and an up half.
        identities: where the ones of the matrices are, by what follows the layer's number in their
            names; empty where matrices are copies.
    """

    gated: bool
    identities: Mapping[str, tuple[_Run, ...]]

    def weights(self, name: str, drawn: WeightInit) -> WeightInit | None:
        """Weights of a new layer's parameter, given fresh ones; None are the source layer's."""
        if self.gated and ".mlp.linear_fc2." in name:
            return Constant(0.0)
        if self.gated and ".pre_mlp_layernorm." in name:
            return drawn if self.identities else None
        if _is_zeroed(name):
            return Constant(0.0)
        for tail, runs in self.identities.items():
            if name.endswith(tail):
                reads_features = tail in (_QKV, _FC1)
                rest = drawn if reads_features and isinstance(drawn, Normal) else None
                return Diagonals(runs, rest)
        return None


def identity_init_of(
    plan: GrowthPlan, layer: Mapping[str, Shape], query_groups: int | None
) -> IdentityInit | None:
    """How a plan silences new layers, or None if it does not.

    Args:
        plan: what to do.
        layer: whole shapes of a layer's parameters by what follows its number in their names.
        query_groups: of the model's attention, if known.

    Raises:
        PlanError: if such layers of the plan would not be the identity, or would not be known to be
            what the plan says.
    """
    new = [origin for origin in plan.layer_map if origin.silent]
    if not new:
        return None
    if any(".post_attn_layernorm." in tail for tail in layer):
        raise PlanError(
            f"operator {plan.operator!r} silences the norms of pre-LN layers, but this model is "
            "post-LN, where they act on the residual stream. Take 'post_ln_identity', whose option "
            f"after = {list(range(plan.source_layers))} doubles a post-LN model."
        )
    wanted = {*_NORMS, _QKV, _PROJECTION, _FC1, _FC2}
    known = {tail for tail in layer if tail in wanted or _is_zeroed(tail)}
    if missing := sorted(wanted - known) or sorted(set(layer) - known):
        raise PlanError(
            f"operator {plan.operator!r} knows layers with {', '.join(sorted(wanted))}, biases and "
            f"norms, but it is not so of {missing[0]} in this model. Take another operator."
        )
    gated = is_gated(layer)
    if new[0].init != "identity":
        return IdentityInit(gated, {})
    return IdentityInit(gated, _identities(layer, gated, _groups(plan, layer, query_groups)))


def _is_zeroed(name: str) -> bool:
    return "norm" in name or name.endswith(".bias")


def _groups(plan: GrowthPlan, layer: Mapping[str, Shape], known: int | None) -> int:
    """Query groups: the checkpoint's, or the option's where it does not tell."""
    asked = plan.options.get("query_groups")
    if known is None and asked is None:
        raise PlanError(
            f"operator {plan.operator!r}: the checkpoint does not tell the model's number of query "
            "groups, on which identity matrices of q, k and v depend. Give the option query_groups "
            "(attention heads where each has keys of its own), or matrices = copy."
        )
    if None not in (known, asked) and known != asked:
        raise PlanError(
            f"operator {plan.operator!r}: query_groups is {asked}, but the checkpoint's model has "
            f"{known}. Leave the option out."
        )
    groups = int(str(asked if known is None else known))
    queries, rows = layer[_PROJECTION][1], layer[_QKV][0]
    if queries % groups or rows <= queries or (rows - queries) % (2 * groups):
        raise PlanError(
            f"operator {plan.operator!r}: {rows} rows of linear_qkv, {queries} of them queries, "
            f"are not {groups} query groups. Correct query_groups."
        )
    return groups


def _identities(
    layer: Mapping[str, Shape], gated: bool, groups: int
) -> dict[str, tuple[_Run, ...]]:
    features = layer[_QKV][1]
    queries, halves = layer[_PROJECTION][1], 2 if gated else 1
    keys, height = layer[_QKV][0] - queries, layer[_FC1][0] // halves
    query, key = queries // groups, keys // (2 * groups)
    runs: list[_Run] = []
    for group in range(groups):  # rows of a group: its heads' queries, its keys, its values
        row = group * (query + 2 * key)
        runs.append((row, group * query, query))
        runs += ((row + query + part * key, group * key, key) for part in (0, 1))
    return {
        _QKV: tuple((row, low, min(n, features - low)) for row, low, n in runs if low < features),
        _PROJECTION: ((0, 0, min(layer[_PROJECTION])),),
        _FC1: tuple((half * height, 0, min(height, features)) for half in range(halves)),
        _FC2: ((0, 0, min(layer[_FC2])),),
    }
