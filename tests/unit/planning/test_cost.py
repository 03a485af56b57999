"""Stages, and the counts of parameters and FLOPs."""

import dataclasses
from typing import Any

import pytest
from conftest import run_ranks

from lag_megatron.config import ModelConfig, RunConfig, StageConfig, parse_config
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.planning.cost import (
    parameter_count,
    stage_flops,
    tokens_per_step,
    training_flops_per_token,
    validation_flops_per_token,
)

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=4,
    seq_length=16,
    vocab_size=64,
)


def run_of(**model: object) -> RunConfig:
    changed = dataclasses.replace(TINY, **model)  # type: ignore[arg-type]
    return RunConfig(model=changed, stages=(StageConfig(steps=1),))


def test_stages() -> None:
    stages = [StageConfig(steps=3), StageConfig(steps=2)]
    assert stage_ranges(stages) == (range(3), range(3, 5))


def test_flops_of_the_published_ul2_model() -> None:
    ul2 = run_of(
        hidden_size=2048,
        ffn_hidden_size=5120,
        num_attention_heads=32,
        num_query_groups=32,
        seq_length=1280,
        activation="swiglu",
    )
    flops = training_flops_per_token(ul2, num_layers=12, vocab_size=256_000)
    body = 6 * 12 * (4 * 2048**2 + 3 * 2048 * 5120)
    assert flops == body + 6 * 256_000 * 2048 + 6 * 12 * 2048 * 1280
    assert flops == pytest.approx(6.81e9, rel=2e-3)
    assert validation_flops_per_token(ul2, num_layers=12, vocab_size=256_000) == flops // 3


def test_bert_computes_its_heads_for_what_is_predicted_and_attends_to_all() -> None:
    bert = run_of(
        family="bert",
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_query_groups=12,
        seq_length=512,
    )
    flops = training_flops_per_token(bert, num_layers=12, vocab_size=30_522)
    body = 6 * 12 * 12 * 768**2 + 12 * 12 * 768 * 512
    heads = 77 * (30_522 * 768 + 768**2) // 512  # 77 of 512 places are 15 %
    assert flops == body + 6 * heads


def test_flops_of_a_stage() -> None:
    model = {**dataclasses.asdict(TINY), "vocab_size": 4096}
    tree = {"model": model, "stages": [{"steps": 3}, {"steps": 2}]}
    config = parse_config(tree)
    assert tokens_per_step(config) == 32 * 16
    per_token = training_flops_per_token(config, num_layers=2, vocab_size=64)
    assert stage_flops(config, 1, vocab_size=64) == 2 * 32 * 16 * per_token


def test_tensor_parallel_ranks_hold_the_whole_model_once_and_the_norms_twice() -> None:
    whole = parameter_count(TINY, num_layers=2, vocab_size=64)
    half = parameter_count(TINY, num_layers=2, vocab_size=64, tensor=2)
    norms_and_row_biases = 2 * (4 * 32 + 2 * 32) + 2 * 32
    assert 2 * half == whole + norms_and_row_biases + 16 * 32


VARIANTS: dict[str, dict[str, object]] = {
    "gpt2": {},
    "untied": {"tied_embeddings": False},
    "rope": {"positions": "rope"},
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"activation": "swiglu"},
    "no-bias": {"bias": False},
    "grouped-queries": {"num_query_groups": 2},
    "llama": {
        "tied_embeddings": False,
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "num_query_groups": 1,
    },
}


@pytest.fixture(scope="module")
def megatrons_counts() -> dict[str, int]:
    """Of each variant, made in a rank of its own.

    Megatron-Core keeps groups in variables that it does not clear: a rank that is forked later
    would wait, when it replaces them, for their threads, which a fork does not copy.
    """
    (counts,) = run_ranks(counted, 1)
    return dict(counts)


def counted() -> dict[str, int]:
    from lag_megatron.distributed.world import start_world, stop_world

    start_world(tensor=1)
    counts = {
        name: sum(p.numel() for p in megatron_model(variant(name)).parameters())
        for name in VARIANTS
    }
    stop_world()
    return counts


def variant(name: str) -> ModelConfig:
    return dataclasses.replace(TINY, **VARIANTS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_megatrons(name: str, megatrons_counts: dict[str, int]) -> None:
    count = parameter_count(variant(name), num_layers=2, vocab_size=64)
    assert count == megatrons_counts[name]


def megatron_model(model: ModelConfig) -> Any:
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    rmsnorm = model.norm == "rmsnorm"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        normalization="RMSNorm" if rmsnorm else "LayerNorm",
        gated_linear_unit=model.activation == "swiglu",
        activation_func=torch.nn.functional.silu,
        add_bias_linear=model.bias,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization="RMSNorm" if rmsnorm else None
        ),
        vocab_size=64,
        max_sequence_length=model.seq_length,
        position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
        share_embeddings_and_output_weights=model.tied_embeddings,
    )
