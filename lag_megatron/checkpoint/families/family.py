"""What a family of models is described by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lag_megatron.config.schema.param_names import Role

Branch = Literal["attention", "mlp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """The parameters of one kind of layer.

    Names are what follows the layer's number, ``mlp.c_fc.weight`` of
    ``transformer.h.3.mlp.c_fc.weight``; of modules they stop before ``.weight``.

    Attributes:
        roles: of every parameter that such a layer may have.
        required: parameters without which a layer is not of this kind.
        cuts: the dimension along which tensor parallelism cuts a parameter; others are whole.
        pre_norms: norm modules before each branch, in a pre-LN layer.
        post_norms: norm modules after each branch, in a post-LN layer.
        tells_norm_position: whether names differ between pre-LN and post-LN layers.
        attention_in: matrices that make queries, keys and values, joined or one each.
        attention_out: the matrix back into the residual stream.
        mlp_in: matrices into the MLP, those of a gated one joined (gate rows first) or one each.
        mlp_out: the matrix back into the residual stream.
        grouped_qkv: whether joined queries, keys and values lie by query group, as in Megatron, or
            all queries, then all keys, then all values.
        transposed: whether matrices are (in, out).
    """

    roles: Mapping[str, Role]
    required: frozenset[str]
    cuts: Mapping[str, int] = field(default_factory=dict)
    pre_norms: Mapping[Branch, tuple[str, ...]] = field(default_factory=dict)
    post_norms: Mapping[Branch, tuple[str, ...]] = field(default_factory=dict)
    tells_norm_position: bool = True
    attention_in: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    grouped_qkv: bool = False
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model under one naming.

    Attributes:
        title: for messages.
        layer: of its layers.
        outside: roles of the parameters that belong to no layer, by the end of their names, from a
            dot on.
        cuts: the dimension along which tensor parallelism cuts these.
    """

    title: str
    layer: LayerTable
    outside: Mapping[str, Role] = field(default_factory=dict)
    cuts: Mapping[str, int] = field(default_factory=dict)


def with_biases(roles: Mapping[str, Role]) -> dict[str, Role]:
    """Roles of weights, each followed by its module's bias."""
    found: dict[str, Role] = {}
    for name, role in roles.items():
        found |= {name: role, f"{name.removesuffix('.weight')}.bias": "bias"}
    return found
