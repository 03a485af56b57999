"""GPT: Megatron-Core's GPTModel, and GPT-2 of transformers."""

from lag_megatron.checkpoint.families.family import Family, LayerTable, with_biases
from lag_megatron.checkpoint.families.megatron_layer import MEGATRON_LAYER

MEGATRON = Family(
    title="Megatron-Core's GPT",
    layer=MEGATRON_LAYER,
    outside={
        "embedding.word_embeddings.weight": "embedding",
        "embedding.position_embeddings.weight": "embedding",
        "decoder.final_layernorm.weight": "norm_weight",
        "decoder.final_layernorm.bias": "bias",
        "output_layer.weight": "head",
        "output_layer.bias": "bias",
    },
    cuts={
        "embedding.word_embeddings.weight": 0,
        "output_layer.weight": 0,
        "output_layer.bias": 0,
    },
)

TRANSFORMERS = Family(
    title="transformers' GPT-2",
    layer=LayerTable(
        roles=with_biases(
            {
                "ln_1.weight": "norm_weight",
                "attn.c_attn.weight": "branch_input",
                "attn.c_proj.weight": "branch_output",
                "ln_2.weight": "norm_weight",
                "crossattention.c_attn.weight": "branch_input",
                "crossattention.q_attn.weight": "branch_input",
                "crossattention.c_proj.weight": "branch_output",
                "ln_cross_attn.weight": "norm_weight",
                "mlp.c_fc.weight": "branch_input",
                "mlp.c_proj.weight": "branch_output",
            }
        ),
        required=frozenset({"attn.c_attn.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}),
        pre_norms={"attention": ("ln_1",), "mlp": ("ln_2",)},
        attention_in=("attn.c_attn.weight",),
        attention_out="attn.c_proj.weight",
        mlp_in=("mlp.c_fc.weight",),
        mlp_out="mlp.c_proj.weight",
        transposed=True,
    ),
    outside={
        "wte.weight": "embedding",
        "wpe.weight": "embedding",
        "ln_f.weight": "norm_weight",
        "ln_f.bias": "bias",
        "lm_head.weight": "head",
    },
)
