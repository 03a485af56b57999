"""Initial weights of new layers that are the identity because their norms are 0 (staged training).

Shen et al. 2022 (arXiv 2203.06211) insert pre-LN layers whose norms have weight and bias 0.  The
inputs of both branches are then 0, and without biases so are their outputs, whatever their matrices
are.  The paper's matrices are identities.  Two things differ here, so that the layer can learn:

- fc1 has more rows than the model has features.  If those beyond the identity were 0, and with them
  the columns of fc2 that read them, neither would ever get a gradient.  So they are drawn, as
  Megatron-Core initialises them; the function of the MLP stays the same.
- A gated MLP multiplies two activations that are both 0 after a zero norm, so nothing in it would
  ever get a gradient.  There fc2 is 0 instead, as in LLaMA Pro (Wu et al. 2024, arXiv 2401.02415),
  and the norm is 1 beside identity matrices, or the source layer's beside copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lag_megatron.checkpoint.families.family import LayerTable
from lag_megatron.checkpoint.families.roles import ModelRoles
from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.config.schema.param_names import Role
from lag_megatron.errors import PlanError
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Constant, Diagonals, Normal, WeightInit

_Run = tuple[int, int, int]
# What makes a norm put out zeros, and the biases after it.
_ZEROED: Mapping[Role, float] = {
    "norm_weight": 0.0,
    "norm_weight_zero_centred": -1.0,
    "bias": 0.0,
}


@dataclass(frozen=True, slots=True)
class IdentityInit:
    """The initial weights of a plan's new layers with ``zero_norms``.

    Parameters are given by the part of the name after the layer's number.

    Attributes:
        constants: values of parameters that are one value everywhere.
        fresh: parameters that start as in a new model.
        identities: the runs of ones in identity matrices; empty if matrices are copies.
        readers: matrices of ``identities`` whose other rows are drawn.
        transposed: whether matrices are (in, out).
    """

    constants: Mapping[str, float]
    fresh: frozenset[str]
    identities: Mapping[str, tuple[_Run, ...]]
    readers: frozenset[str]
    transposed: bool

    def weights(self, tail: str, drawn: Normal | Constant | None) -> WeightInit | None:
        """Initial weights of a new layer's parameter; None for a copy of the source layer's.

        Args:
            tail: the part of its name after the layer's number.
            drawn: the initial weights of a new model.
        """
        if tail in self.fresh:
            return drawn
        if tail in self.constants:
            return Constant(self.constants[tail])
        if tail not in self.identities:
            return None
        rest = drawn if tail in self.readers and isinstance(drawn, Normal) else None
        return Diagonals(self.identities[tail], rest, self.transposed)


def identity_init_of(
    plan: GrowthPlan, layer: Mapping[str, Shape], roles: ModelRoles, query_groups: int | None
) -> IdentityInit | None:
    """The initial weights of a plan's layers with ``zero_norms``; None if it has no such layers.

    Args:
        plan: the growth plan.
        layer: unsharded shapes of a layer's parameters, by the part of the name after its number.
        roles: of the model's parameters.
        query_groups: of the model's attention, if known.

    Raises:
        PlanError: if the layers would not be the identity in this model, or it has parameters that
            are not known.
    """
    new = [origin for origin in plan.layer_map if origin.zero_norms]
    if not new or roles.stack is None:
        return None
    assert roles.family, "the plan's roles have been looked for"
    table = roles.family.layer
    _require_pre_norms(plan, layer, table)
    zeroed = {
        tail: value
        for tail in layer
        if (value := _ZEROED.get(roles.by_name[roles.stack.name(0, tail)])) is not None
    }
    matrices = {*table.attention_in, table.attention_out, *table.mlp_in, table.mlp_out}
    norms = {f"{m}.weight" for modules in table.pre_norms.values() for m in modules}
    known = {
        tail
        for tail in layer
        if roles.by_name[roles.stack.name(0, tail)] in (*_ZEROED, "layer_scale", "fixed")
    } | matrices
    if missing := sorted((norms | matrices) - set(layer)) or sorted(set(layer) - known):
        raise PlanError(
            f"operator {plan.operator!r} knows layers with {', '.join(sorted(norms | matrices))}, "
            f"biases and norms, but it is not so of {missing[0]} in this model. Take another "
            "operator."
        )
    return _init_of(plan, layer, table, zeroed, query_groups, copies=new[0].init != "identity")


def _init_of(
    plan: GrowthPlan,
    layer: Mapping[str, Shape],
    table: LayerTable,
    zeroed: dict[str, float],
    query_groups: int | None,
    *,
    copies: bool,
) -> IdentityInit:
    features = 0 if table.transposed else 1
    gated = sum(layer[m][1 - features] for m in table.mlp_in) == 2 * layer[table.mlp_out][features]
    fresh: frozenset[str] = frozenset()
    if gated:
        mlp_norms = frozenset(
            tail for tail in layer if tail.rpartition(".")[0] in table.pre_norms["mlp"]
        )
        zeroed = {tail: value for tail, value in zeroed.items() if tail not in mlp_norms}
        fresh = frozenset() if copies else mlp_norms
        zeroed[table.mlp_out] = 0.0
    identities = {}
    if not copies:
        turned = {t: s[::-1] if table.transposed else s for t, s in layer.items()}
        identities = _identities(turned, table, gated, plan, query_groups)
    readers = frozenset({*table.attention_in, *table.mlp_in})
    return IdentityInit(zeroed, fresh, identities, readers, table.transposed)


def _require_pre_norms(plan: GrowthPlan, layer: Mapping[str, Shape], table: LayerTable) -> None:
    modules = {tail.rpartition(".")[0] for tail in layer}
    if not any(modules & set(norms) for norms in table.post_norms.values()):
        return
    if not table.tells_norm_position:
        raise PlanError(
            f"operator {plan.operator!r} silences the norms of pre-LN layers, but the names of "
            "torch's layers do not tell whether theirs are (norm_first). Take 'llama_pro' for "
            "pre-LN layers, 'post_ln_identity' for post-LN ones."
        )
    raise PlanError(
        f"operator {plan.operator!r} silences the norms of pre-LN layers, but this model is "
        "post-LN, where they act on the residual stream. Take 'post_ln_identity', whose option "
        f"after = {list(range(plan.source_layers))} doubles a post-LN model."
    )


def _groups(
    plan: GrowthPlan, layer: Mapping[str, Shape], table: LayerTable, known: int | None
) -> int:
    """Query groups: the checkpoint's, or the option's if it does not record them."""
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
    queries, rows = layer[table.attention_out][1], layer[table.attention_in[0]][0]
    if queries % groups or rows <= queries or (rows - queries) % (2 * groups):
        raise PlanError(
            f"operator {plan.operator!r}: {rows} rows of linear_qkv, {queries} of them queries, "
            f"are not {groups} query groups. Correct query_groups."
        )
    return groups


def _identities(
    layer: Mapping[str, Shape],
    table: LayerTable,
    gated: bool,
    plan: GrowthPlan,
    query_groups: int | None,
) -> dict[str, tuple[_Run, ...]]:
    """Where the ones are, of matrices (out, in)."""
    found = {name: _diagonal(layer[name]) for name in (table.attention_out, table.mlp_out)}
    if len(table.attention_in) > 1:
        found |= {name: _diagonal(layer[name]) for name in table.attention_in}
    else:
        groups = _groups(plan, layer, table, query_groups) if table.grouped_qkv else 1
        found[table.attention_in[0]] = _joined_qkv(layer, table, groups)
    halves = 2 if gated and len(table.mlp_in) == 1 else 1
    for name in table.mlp_in:
        rows, features = layer[name]
        height = rows // halves
        found[name] = tuple((half * height, 0, min(height, features)) for half in range(halves))
    return found


def _joined_qkv(layer: Mapping[str, Shape], table: LayerTable, groups: int) -> tuple[_Run, ...]:
    """Ones of joined queries, keys and values: by group its heads' queries, its keys, its values.

    All queries, then all keys, then all values, are one group.
    """
    rows, features = layer[table.attention_in[0]]
    queries = layer[table.attention_out][1]
    query, key = queries // groups, (rows - queries) // (2 * groups)
    runs: list[_Run] = []
    for group in range(groups):
        row = group * (query + 2 * key)
        runs.append((row, group * query, query))
        runs += ((row + query + part * key, group * key, key) for part in (0, 1))
    return tuple((row, low, min(n, features - low)) for row, low, n in runs if low < features)


def _diagonal(shape: Shape) -> tuple[_Run, ...]:
    return ((0, 0, min(shape)),)
