"""BERT: Megatron-Core's BertModel, and that of transformers."""

from lag_megatron.checkpoint.families.family import Family, LayerTable, with_biases
from lag_megatron.checkpoint.families.megatron_layer import MEGATRON_LAYER

MEGATRON = Family(
    title="Megatron-Core's BERT",
    layer=MEGATRON_LAYER,
    outside={
        "embedding.word_embeddings.weight": "embedding",
        "embedding.position_embeddings.weight": "embedding",
        "embedding.tokentype_embeddings.weight": "embedding",
        "embedding.embedding_dropout.layernorm.weight": "norm_weight",
        "embedding.embedding_dropout.layernorm.bias": "bias",
        "encoder.final_layernorm.weight": "norm_weight",
        "encoder.final_layernorm.bias": "bias",
        "lm_head.dense.weight": "head",
        "lm_head.dense.bias": "bias",
        "lm_head.layer_norm.weight": "norm_weight",
        "lm_head.layer_norm.bias": "bias",
        "output_layer.weight": "head",
        "output_layer.bias": "bias",
        "pooler.dense.weight": "head",
        "pooler.dense.bias": "bias",
        "binary_head.weight": "head",
        "binary_head.bias": "bias",
    },
    cuts={
        "embedding.word_embeddings.weight": 0,
        "output_layer.weight": 0,
        "output_layer.bias": 0,
    },
)

TRANSFORMERS = Family(
    title="transformers' BERT",
    layer=LayerTable(
        roles=with_biases(
            {
                "attention.self.query.weight": "branch_input",
                "attention.self.key.weight": "branch_input",
                "attention.self.value.weight": "branch_input",
                "attention.output.dense.weight": "branch_output",
                "attention.output.LayerNorm.weight": "norm_weight",
                "intermediate.dense.weight": "branch_input",
                "output.dense.weight": "branch_output",
                "output.LayerNorm.weight": "norm_weight",
            }
        ),
        required=frozenset(
            {
                "attention.self.query.weight",
                "attention.output.LayerNorm.weight",
                "intermediate.dense.weight",
                "output.LayerNorm.weight",
            }
        ),
        post_norms={
            "attention": ("attention.output.LayerNorm",),
            "mlp": ("output.LayerNorm",),
        },
        attention_in=(
            "attention.self.query.weight",
            "attention.self.key.weight",
            "attention.self.value.weight",
        ),
        attention_out="attention.output.dense.weight",
        mlp_in=("intermediate.dense.weight",),
        mlp_out="output.dense.weight",
    ),
    outside={
        "embeddings.word_embeddings.weight": "embedding",
        "embeddings.position_embeddings.weight": "embedding",
        "embeddings.token_type_embeddings.weight": "embedding",
        "embeddings.LayerNorm.weight": "norm_weight",
        "embeddings.LayerNorm.bias": "bias",
        "cls.predictions.bias": "bias",
        "cls.predictions.decoder.weight": "head",
        "cls.predictions.decoder.bias": "bias",
        "cls.predictions.transform.dense.weight": "head",
        "cls.predictions.transform.dense.bias": "bias",
        "cls.predictions.transform.LayerNorm.weight": "norm_weight",
        "cls.predictions.transform.LayerNorm.bias": "bias",
        "cls.seq_relationship.weight": "head",
        "cls.seq_relationship.bias": "bias",
        "pooler.dense.weight": "head",
        "pooler.dense.bias": "bias",
    },
)
