"""What a run costs in parameters, tokens, memory and FLOPs, by arithmetic on its configuration."""

from lag_megatron.config import (
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.planning.random_paths import layers_run


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one global batch."""
    return config.parallel.global_batch * config.model.seq_length


def parameter_count(
    model: ModelConfig, *, num_layers: int, vocab_size: int, tensor: int = 1
) -> int:
    """Parameters of Megatron-Core's model, on one of ``tensor`` tensor-parallel ranks.

    Matrices and the biases of column-parallel layers are cut; norms, positions and the biases of
    row-parallel layers are whole on every rank, and so are BERT's heads but for the output layer.
    Tied embeddings count once.
    """
    hidden = model.hidden_size
    norm = hidden * (2 if model.norm == "layernorm" else 1)
    cut = _matmul_parameters_per_layer(model)
    whole = 2 * norm
    if model.bias:
        cut += _qkv_size(model) + _first_mlp_size(model)
        whole += 2 * hidden
    embeddings = vocab_size * hidden * (1 if model.tied_embeddings else 2)
    # One norm stands outside the layers: after the last one, or after post-norm's embeddings.
    rest = norm + model.token_types * hidden
    if model.positions == "learned":
        rest += model.seq_length * hidden
    if model.family == "bert":
        embeddings += vocab_size  # the output layer's bias
        dense = hidden * hidden + hidden
        rest += dense + norm
        if model.sentence_head:
            rest += dense + 2 * hidden + 2
    return (num_layers * cut + embeddings) // tensor + num_layers * whole + rest


def state_bytes_per_parameter(
    parallel: ParallelConfig, *, replicas: int, optimizer: str = "adamw"
) -> dict[str, float]:
    """Bytes that one rank keeps for each parameter of its tensor-parallel share.

    ZeRO shares optimizer states from stage 1, gradients from stage 2 and weights from stage 3
    among ``replicas`` ranks (Rajbhandari et al. 2020, section 5).  Adafactor's means over rows and
    columns are too few to count.
    """
    moments = 8 if optimizer == "adamw" else 0
    stage = parallel.zero_stage
    width = 4 if parallel.precision == "fp32" else 2
    master = 0 if width == 4 and stage == 0 else 4
    return {
        "weights": width / (replicas if stage >= 3 else 1),
        "gradients": width / (replicas if stage >= 2 else 1),
        "optimizer": (master + moments) / (replicas if stage >= 1 else 1),
    }


def training_flops_per_token(config: RunConfig, *, num_layers: int, vocab_size: int) -> int:
    """Floating-point operations of forward and backward for one token, padding included.

    Six per parameter that multiplies, the output layer included and the embedding look-up not,
    plus ``12 L d s`` for attention scores and values, halved where attention is causal
    (Chowdhery et al. 2022, PaLM, appendix B; the half is ours).  BERT's heads count for the
    positions that they compute: those to be predicted, and one for pairs of sentences.  What a
    UL2 prefix sees ahead and recomputation do not count.
    """
    model = config.model
    hidden, length = model.hidden_size, model.seq_length
    attention = 12 * num_layers * hidden * length
    output = vocab_size * hidden
    if model.family == "bert":
        predicted = config.data.mlm.predictions(length) * (output + hidden * hidden)
        pooled = hidden * (hidden + 2) if model.sentence_head else 0
        output = (predicted + pooled) // length
    else:
        attention //= 2
    return 6 * (num_layers * _matmul_parameters_per_layer(model) + output) + attention


def validation_flops_per_token(config: RunConfig, *, num_layers: int, vocab_size: int) -> int:
    """Floating-point operations of one token's forward pass: a third of training's."""
    return training_flops_per_token(config, num_layers=num_layers, vocab_size=vocab_size) // 3


def steps_flops(config: RunConfig, steps: range, *, vocab_size: int) -> int:
    """Floating-point operations of these optimizer steps of the run (0-based), without validation.

    Layers that a step's path leaves out cost nothing.
    """
    return tokens_per_step(config) * sum(
        count * training_flops_per_token(config, num_layers=layers, vocab_size=vocab_size)
        for layers, count in layers_run(config, steps).items()
    )


def stage_flops(config: RunConfig, stage: int, *, vocab_size: int) -> int:
    """Floating-point operations of the optimizer steps of one stage, without validation."""
    return steps_flops(config, stage_ranges(config.stages)[stage], vocab_size=vocab_size)


def training_flops(config: RunConfig, *, vocab_size: int) -> int:
    """Floating-point operations of a run's own steps, all stages together."""
    stages = range(len(config.stages))
    return sum(stage_flops(config, stage, vocab_size=vocab_size) for stage in stages)


def _qkv_size(model: ModelConfig) -> int:
    head_size = model.hidden_size // model.num_attention_heads
    return (model.num_attention_heads + 2 * model.num_query_groups) * head_size


def _first_mlp_size(model: ModelConfig) -> int:
    return model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1)


def _matmul_parameters_per_layer(model: ModelConfig) -> int:
    """Weights of the projections of query, key, value and output, and of the two of the MLP."""
    outputs = _qkv_size(model) + model.hidden_size + _first_mlp_size(model)
    return model.hidden_size * (outputs + model.ffn_hidden_size)
