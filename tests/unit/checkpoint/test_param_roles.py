"""Roles of every parameter of real models, against what is written here by hand."""

import pytest
from torch import nn

from lag_megatron.checkpoint.families.layer_stack import find_layer_stack
from lag_megatron.checkpoint.families.roles import find_roles
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import PlanError

GPT2 = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.h.N.ln_1.weight": "norm_weight",
    "transformer.h.N.ln_1.bias": "bias",
    "transformer.h.N.attn.c_attn.weight": "branch_input",
    "transformer.h.N.attn.c_attn.bias": "bias",
    "transformer.h.N.attn.c_proj.weight": "branch_output",
    "transformer.h.N.attn.c_proj.bias": "bias",
    "transformer.h.N.ln_2.weight": "norm_weight",
    "transformer.h.N.ln_2.bias": "bias",
    "transformer.h.N.mlp.c_fc.weight": "branch_input",
    "transformer.h.N.mlp.c_fc.bias": "bias",
    "transformer.h.N.mlp.c_proj.weight": "branch_output",
    "transformer.h.N.mlp.c_proj.bias": "bias",
    "transformer.ln_f.weight": "norm_weight",
    "transformer.ln_f.bias": "bias",
}
LLAMA = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.N.self_attn.q_proj.weight": "branch_input",
    "model.layers.N.self_attn.q_proj.bias": "bias",
    "model.layers.N.self_attn.k_proj.weight": "branch_input",
    "model.layers.N.self_attn.k_proj.bias": "bias",
    "model.layers.N.self_attn.v_proj.weight": "branch_input",
    "model.layers.N.self_attn.v_proj.bias": "bias",
    "model.layers.N.self_attn.o_proj.weight": "branch_output",
    "model.layers.N.self_attn.o_proj.bias": "bias",
    "model.layers.N.mlp.gate_proj.weight": "branch_input",
    "model.layers.N.mlp.gate_proj.bias": "bias",
    "model.layers.N.mlp.up_proj.weight": "branch_input",
    "model.layers.N.mlp.up_proj.bias": "bias",
    "model.layers.N.mlp.down_proj.weight": "branch_output",
    "model.layers.N.mlp.down_proj.bias": "bias",
    "model.layers.N.input_layernorm.weight": "norm_weight",
    "model.layers.N.post_attention_layernorm.weight": "norm_weight",
    "model.norm.weight": "norm_weight",
    "lm_head.weight": "head",
}
BERT = {
    "bert.embeddings.word_embeddings.weight": "embedding",
    "bert.embeddings.position_embeddings.weight": "embedding",
    "bert.embeddings.token_type_embeddings.weight": "embedding",
    "bert.embeddings.LayerNorm.weight": "norm_weight",
    "bert.embeddings.LayerNorm.bias": "bias",
    "bert.encoder.layer.N.attention.self.query.weight": "branch_input",
    "bert.encoder.layer.N.attention.self.query.bias": "bias",
    "bert.encoder.layer.N.attention.self.key.weight": "branch_input",
    "bert.encoder.layer.N.attention.self.key.bias": "bias",
    "bert.encoder.layer.N.attention.self.value.weight": "branch_input",
    "bert.encoder.layer.N.attention.self.value.bias": "bias",
    "bert.encoder.layer.N.attention.output.dense.weight": "branch_output",
    "bert.encoder.layer.N.attention.output.dense.bias": "bias",
    "bert.encoder.layer.N.attention.output.LayerNorm.weight": "norm_weight",
    "bert.encoder.layer.N.attention.output.LayerNorm.bias": "bias",
    "bert.encoder.layer.N.intermediate.dense.weight": "branch_input",
    "bert.encoder.layer.N.intermediate.dense.bias": "bias",
    "bert.encoder.layer.N.output.dense.weight": "branch_output",
    "bert.encoder.layer.N.output.dense.bias": "bias",
    "bert.encoder.layer.N.output.LayerNorm.weight": "norm_weight",
    "bert.encoder.layer.N.output.LayerNorm.bias": "bias",
    "cls.predictions.bias": "bias",
    "cls.predictions.transform.dense.weight": "head",
    "cls.predictions.transform.dense.bias": "bias",
    "cls.predictions.transform.LayerNorm.weight": "norm_weight",
    "cls.predictions.transform.LayerNorm.bias": "bias",
}
ENCODER_LAYER = {
    "self_attn.in_proj_weight": "branch_input",
    "self_attn.in_proj_bias": "bias",
    "self_attn.out_proj.weight": "branch_output",
    "self_attn.out_proj.bias": "bias",
    "linear1.weight": "branch_input",
    "linear1.bias": "bias",
    "linear2.weight": "branch_output",
    "linear2.bias": "bias",
    "norm1.weight": "norm_weight",
    "norm1.bias": "bias",
    "norm2.weight": "norm_weight",
    "norm2.bias": "bias",
}
DECODER_LAYER = ENCODER_LAYER | {
    "multihead_attn.in_proj_weight": "branch_input",
    "multihead_attn.in_proj_bias": "bias",
    "multihead_attn.out_proj.weight": "branch_output",
    "multihead_attn.out_proj.bias": "bias",
    "norm3.weight": "norm_weight",
    "norm3.bias": "bias",
}
SIZES = {"num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12, "vocab_size": 11}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=2, attention_bias=True, mlp_bias=True, **SIZES)
    return LlamaForCausalLM(config)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(num_hidden_layers=2, max_position_embeddings=6, **SIZES))


def torch_layers(kind, **options):
    model = nn.Module()
    model.embed = nn.Embedding(11, 8)
    model.blocks = nn.ModuleList(kind(8, 2, 12, **options) for _ in range(2))
    return model


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def roles_of(shapes, names=None):
    return find_roles(shapes, find_layer_stack(shapes, names), names)


def by_pattern(model):
    """Roles by name with N in place of the layer's number; both layers agree."""
    shapes = shapes_of(model)
    stack, found = find_layer_stack(shapes), {}
    roles = roles_of(shapes)
    for name in shapes:
        match = stack.match(name)
        pattern = f"{stack.title}.{match.tail}" if match else name
        assert found.setdefault(pattern, roles.of(name)) == roles.of(name)
    return found


@pytest.mark.parametrize(("build", "expected"), [(gpt2, GPT2), (llama, LLAMA), (bert, BERT)])
def test_models_of_transformers(build, expected):
    assert by_pattern(build()) == expected


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [(nn.TransformerEncoderLayer, ENCODER_LAYER), (nn.TransformerDecoderLayer, DECODER_LAYER)],
)
def test_torch_layers_in_a_list_of_any_name(kind, expected, norm_first):
    wanted = {f"blocks.N.{tail}": role for tail, role in expected.items()}
    found = by_pattern(torch_layers(kind, norm_first=norm_first))
    assert found == wanted | {"embed.weight": None}


def test_a_bias_of_a_branch_output_is_one_too():
    shapes = shapes_of(gpt2())
    roles = roles_of(shapes)
    found = {
        name.removeprefix("transformer.h.1.") for name in shapes if roles.is_branch_output(name)
    }
    assert {name for name in found if not name.startswith("transformer.")} == {
        "attn.c_proj.weight",
        "attn.c_proj.bias",
        "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    }


def test_one_other_name_and_the_table_is_not_taken():
    """Gemma 2 has Llama's names and two norms more, which are zero-centred, as all of its are."""
    shapes = shapes_of(llama())
    for layer in range(2):
        shapes[f"model.layers.{layer}.pre_feedforward_layernorm.weight"] = (8,)
    roles = roles_of(shapes)
    assert roles.family is None
    assert {roles.of(name) for name in shapes} == {None}


def test_patterns_come_before_the_table_and_complete_it():
    shapes = shapes_of(llama())
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_norm.weight"] = (4,)
    names = ParamNames(
        {"*.q_norm.weight": "norm_weight", "*_layernorm.weight": "norm_weight_zero_centred"}
    )
    roles = roles_of(shapes, names)
    layer = "model.layers.1."
    assert roles.of(layer + "self_attn.q_norm.weight") == "norm_weight"
    assert roles.of(layer + "input_layernorm.weight") == "norm_weight_zero_centred"
    assert roles.of(layer + "mlp.down_proj.weight") == "branch_output"
    assert roles.of("model.norm.weight") == "norm_weight"


def test_patterns_that_do_not_fit_the_model():
    shapes = shapes_of(gpt2())
    with pytest.raises(PlanError, match=r"'\*\.ln1\.\*' .* matches no .*transformer\.wte"):
        roles_of(shapes, ParamNames({"*.ln1.*": "norm_weight"}))
    both = ParamNames({"*.ln_?.weight": "norm_weight", "*.h.0.*.weight": "branch_input"})
    with pytest.raises(PlanError, match=r"'\*\.ln_\?\.weight' and '\*\.h\.0\.\*\.weight' .*ln_1"):
        roles_of(shapes, both)


def test_frozen_parameters_without_a_role_are_fixed():
    shapes = {"blocks.0.mix.weight": (4, 4), "blocks.0.up.weight": (4, 4)}
    stack = find_layer_stack(shapes)
    roles = find_roles(shapes, stack, untrained=["blocks.0.mix.weight"])
    assert roles.of("blocks.0.mix.weight") == "fixed"
    assert roles.of("blocks.0.up.weight") is None
    given = ParamNames({"*.mix.weight": "branch_input"})
    roles = find_roles(shapes, stack, given, untrained=["blocks.0.mix.weight"])
    assert roles.of("blocks.0.mix.weight") == "branch_input"


def test_buffers_and_further_names_may_be_matched():
    shapes = {"blocks.0.up.weight": (4, 4)}
    names = ParamNames({"*.gain": "fixed"})
    find_roles(shapes, find_layer_stack(shapes), names, others=["blocks.0.gain"])
    with pytest.raises(PlanError, match="matches no parameter"):
        find_roles(shapes, find_layer_stack(shapes), names)
