"""Every parameter of Megatron-Core's models, as this package builds them, has its role."""

import pytest
from conftest import PICO_VOCABULARY, run_ranks
from families import FAMILIES, family_config

from lag_megatron.checkpoint.families.layer_stack import find_layer_stack
from lag_megatron.checkpoint.families.roles import find_roles, megatron_role

LAYER = {
    "self_attention.linear_proj.weight": "branch_output",
    "self_attention.linear_qkv.weight": "branch_input",
    "mlp.linear_fc1.weight": "branch_input",
    "mlp.linear_fc2.weight": "branch_output",
}
LINEAR_BIASES = {name.replace("weight", "bias"): "bias" for name in LAYER}
PRE_NORMS = {"input_layernorm.weight": "norm_weight", "pre_mlp_layernorm.weight": "norm_weight"}
PRE_NORM_BIASES = {"input_layernorm.bias": "bias", "pre_mlp_layernorm.bias": "bias"}
POST_NORMS = {
    "post_attn_layernorm.weight": "norm_weight",
    "post_attn_layernorm.bias": "bias",
    "post_mlp_layernorm.weight": "norm_weight",
    "post_mlp_layernorm.bias": "bias",
}
WORDS = {"embedding.word_embeddings.weight": "embedding"}
POSITIONS = {"embedding.position_embeddings.weight": "embedding"}
BERT = {
    "embedding.tokentype_embeddings.weight": "embedding",
    "lm_head.dense.weight": "head",
    "lm_head.dense.bias": "bias",
    "lm_head.layer_norm.weight": "norm_weight",
    "lm_head.layer_norm.bias": "bias",
    "output_layer.bias": "bias",
    "pooler.dense.weight": "head",
    "pooler.dense.bias": "bias",
    "binary_head.weight": "head",
    "binary_head.bias": "bias",
}


def numbered(head, roles):
    return {f"{head}.layers.N.{name}": role for name, role in roles.items()}


EXPECTED = {
    "gpt2": {
        **numbered("decoder", LAYER | LINEAR_BIASES | PRE_NORMS | PRE_NORM_BIASES),
        **WORDS,
        **POSITIONS,
        "decoder.final_layernorm.weight": "norm_weight",
        "decoder.final_layernorm.bias": "bias",
    },
    "llama": {
        **numbered("decoder", LAYER | PRE_NORMS),
        **WORDS,
        "decoder.final_layernorm.weight": "norm_weight",
        "output_layer.weight": "head",
    },
    "bert-post": {
        **numbered("encoder", LAYER | LINEAR_BIASES | POST_NORMS),
        **WORDS,
        **POSITIONS,
        **BERT,
        "embedding.embedding_dropout.layernorm.weight": "norm_weight",
        "embedding.embedding_dropout.layernorm.bias": "bias",
    },
    "bert-pre": {
        **numbered("encoder", LAYER | LINEAR_BIASES | PRE_NORMS | PRE_NORM_BIASES),
        **WORDS,
        **POSITIONS,
        **BERT,
        "encoder.final_layernorm.weight": "norm_weight",
        "encoder.final_layernorm.bias": "bias",
        "output_layer.weight": "head",
    },
}


def shapes_of(family):
    """On a rank: names and shapes of the model's parameters."""
    from lag_megatron.distributed.world import start_world
    from lag_megatron.model import build_model

    config = family_config(family)
    start_world(tensor=1)
    model = build_model(config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_role(family):
    (shapes,) = run_ranks(shapes_of, 1, family)
    stack = find_layer_stack(shapes)
    assert stack.numbers == (0, 1)
    roles, found = find_roles(shapes, stack), {}
    for name in shapes:
        match = stack.match(name)
        pattern = f"{stack.title}.{match.tail}" if match else name
        assert found.setdefault(pattern, roles.of(name)) == roles.of(name) == megatron_role(name)
    assert found == EXPECTED[family]
