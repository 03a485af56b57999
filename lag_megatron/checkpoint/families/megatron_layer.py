"""Megatron-Core's TransformerLayer, which its GPT, BERT and Llama share.

The norms of post-LN layers are this package's (``model/transformer.py``), which Megatron-Core does
not have.  Cuts are Megatron-Core's: column-parallel weights by output, row-parallel ones by input.
``linear_qkv`` is stored by query group, so a plain cut keeps groups whole; the gate and up halves
of a gated ``linear_fc1`` are cut each for itself.
"""

from lag_megatron.checkpoint.families.family import LayerTable, with_biases

MEGATRON_LAYER = LayerTable(
    roles=with_biases(
        {
            "input_layernorm.weight": "norm_weight",
            "self_attention.linear_proj.weight": "branch_output",
            "self_attention.linear_qkv.weight": "branch_input",
            "self_attention.q_layernorm.weight": "norm_weight",
            "self_attention.k_layernorm.weight": "norm_weight",
            "pre_mlp_layernorm.weight": "norm_weight",
            "mlp.linear_fc1.weight": "branch_input",
            "mlp.linear_fc2.weight": "branch_output",
            "post_attn_layernorm.weight": "norm_weight",
            "post_mlp_layernorm.weight": "norm_weight",
        }
    )
    | {  # Transformer Engine keeps a norm in the linear layer after it
        "self_attention.linear_qkv.layer_norm_weight": "norm_weight",
        "self_attention.linear_qkv.layer_norm_bias": "bias",
        "mlp.linear_fc1.layer_norm_weight": "norm_weight",
        "mlp.linear_fc1.layer_norm_bias": "bias",
    },
    required=frozenset({"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}),
    cuts={
        "self_attention.linear_qkv.weight": 0,
        "self_attention.linear_qkv.bias": 0,
        "self_attention.linear_proj.weight": 1,
        "mlp.linear_fc1.weight": 0,
        "mlp.linear_fc1.bias": 0,
        "mlp.linear_fc2.weight": 1,
    },
    pre_norms={"attention": ("input_layernorm",), "mlp": ("pre_mlp_layernorm",)},
    post_norms={"attention": ("post_attn_layernorm",), "mlp": ("post_mlp_layernorm",)},
    attention_in=("self_attention.linear_qkv.weight",),
    attention_out="self_attention.linear_proj.weight",
    mlp_in=("mlp.linear_fc1.weight",),
    mlp_out="mlp.linear_fc2.weight",
    grouped_qkv=True,
)
