"""torch's nn.TransformerEncoderLayer and nn.TransformerDecoderLayer, in a list of any name.

Their names are the same with and without ``norm_first``, so they do not tell whether a layer is
pre-LN or post-LN.
"""

from lag_megatron.checkpoint.families.family import Family, LayerTable, with_biases
from lag_megatron.config.schema.param_names import Role

_ATTENTION: dict[str, Role] = {
    "in_proj_weight": "branch_input",
    "q_proj_weight": "branch_input",  # in place of in_proj_weight where keys have their own size
    "k_proj_weight": "branch_input",
    "v_proj_weight": "branch_input",
    "in_proj_bias": "bias",
    "out_proj.weight": "branch_output",
    "out_proj.bias": "bias",
    "bias_k": "branch_input",  # torch draws these two, which stand for a key and a value
    "bias_v": "branch_input",
}
_SELF: dict[str, Role] = {f"self_attn.{name}": role for name, role in _ATTENTION.items()}
_CROSS: dict[str, Role] = {f"multihead_attn.{name}": role for name, role in _ATTENTION.items()}
_MLP = with_biases({"linear1.weight": "branch_input", "linear2.weight": "branch_output"})
_NORMS = with_biases({"norm1.weight": "norm_weight", "norm2.weight": "norm_weight"})
# nn.TransformerEncoder and nn.TransformerDecoder end in a norm if they are given one.
_OUTSIDE = with_biases({"norm.weight": "norm_weight"})
_REQUIRED = frozenset({"self_attn.out_proj.weight", "linear1.weight", "linear2.weight"})

ENCODER = Family(
    title="torch's nn.TransformerEncoderLayer",
    layer=LayerTable(
        roles=_SELF | _MLP | _NORMS,
        required=_REQUIRED,
        post_norms={"attention": ("norm1",), "mlp": ("norm2",)},
        tells_norm_position=False,
        attention_in=("self_attn.in_proj_weight",),
        attention_out="self_attn.out_proj.weight",
        mlp_in=("linear1.weight",),
        mlp_out="linear2.weight",
    ),
    outside=_OUTSIDE,
)

DECODER = Family(
    title="torch's nn.TransformerDecoderLayer",
    layer=LayerTable(
        roles=_SELF | _CROSS | _MLP | _NORMS | with_biases({"norm3.weight": "norm_weight"}),
        required=_REQUIRED | {"multihead_attn.out_proj.weight", "norm3.weight"},
        post_norms={"attention": ("norm1", "norm2"), "mlp": ("norm3",)},
        tells_norm_position=False,
        attention_in=("self_attn.in_proj_weight",),
        attention_out="self_attn.out_proj.weight",
        mlp_in=("linear1.weight",),
        mlp_out="linear2.weight",
    ),
    outside=_OUTSIDE,
)
