"""Llama: Megatron-Core's, and that of transformers, whose names Mistral and Qwen2 share.

Gemma shares them too, but its norms are zero-centred, which no name tells: a names file has to.
"""

from lag_megatron.checkpoint.families.family import Family, LayerTable, with_biases
from lag_megatron.checkpoint.families.megatron_layer import MEGATRON_LAYER

MEGATRON = Family(
    title="Megatron-Core's Llama",
    layer=MEGATRON_LAYER,
    outside={
        "embedding.word_embeddings.weight": "embedding",
        "decoder.final_layernorm.weight": "norm_weight",
        "output_layer.weight": "head",
    },
    cuts={"embedding.word_embeddings.weight": 0, "output_layer.weight": 0},
)

TRANSFORMERS = Family(
    title="transformers' Llama",
    layer=LayerTable(
        roles=with_biases(
            {
                "self_attn.q_proj.weight": "branch_input",
                "self_attn.k_proj.weight": "branch_input",
                "self_attn.v_proj.weight": "branch_input",
                "self_attn.o_proj.weight": "branch_output",
                "mlp.gate_proj.weight": "branch_input",
                "mlp.up_proj.weight": "branch_input",
                "mlp.down_proj.weight": "branch_output",
            }
        )
        | {
            "input_layernorm.weight": "norm_weight",
            "post_attention_layernorm.weight": "norm_weight",
            "self_attn.rotary_emb.inv_freq": "fixed",
        },
        required=frozenset(
            {
                "self_attn.q_proj.weight",
                "self_attn.o_proj.weight",
                "mlp.gate_proj.weight",
                "mlp.down_proj.weight",
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
            }
        ),
        pre_norms={"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)},
        attention_in=(
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        attention_out="self_attn.o_proj.weight",
        mlp_in=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        mlp_out="mlp.down_proj.weight",
    ),
    outside={
        "embed_tokens.weight": "embedding",
        "norm.weight": "norm_weight",
        "lm_head.weight": "head",
    },
)
