"""Checks of the model's shape and of how it is computed."""

from collections.abc import Iterator

from lag_megatron.config.schema.run import RunConfig


def model_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the model and between it and the rest, one line each."""
    yield from _divisions(config)
    yield from _bert(config) if config.model.family == "bert" else _gpt(config)
    yield from _sequence_parallel(config)
    model = config.model
    if not 0 <= model.dropout < 1:
        yield f"model.dropout: must be in [0, 1) (got {model.dropout})."
    if not 0 <= model.label_smoothing < 1:
        yield f"model.label_smoothing: must be in [0, 1) (got {model.label_smoothing})."
    if model.z_loss < 0:
        yield f"model.z_loss: must not be negative (got {model.z_loss})."
    if model.token_types < 0:
        yield f"model.token_types: must not be negative (got {model.token_types})."


def _divisions(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if model.num_attention_heads <= 0 or model.num_query_groups <= 0 or parallel.tensor <= 0:
        return
    tensor = parallel.tensor
    divisions = [
        ("model.hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads),
        ("model.num_attention_heads", model.num_attention_heads, "num_query_groups",
         model.num_query_groups),
        ("model.num_query_groups", model.num_query_groups, "parallel.tensor", tensor),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tensor", tensor),
    ]  # fmt: skip
    if isinstance(model.vocab_size, int):
        divisions.append(("model.vocab_size", model.vocab_size, "parallel.tensor", tensor))
    if parallel.sequence_parallel:
        divisions.append(("model.seq_length", model.seq_length, "parallel.tensor", tensor))
    for path, value, name, divisor in divisions:
        if value % divisor:
            yield f"{path}: {value} is not a multiple of {name} = {divisor}."


def _gpt(config: RunConfig) -> Iterator[str]:
    model, objective = config.model, config.data.objective
    for name, value, plain in (
        ("norm_position", model.norm_position, "pre"),
        ("token_types", model.token_types, 0),
        ("sentence_head", model.sentence_head, False),
    ):
        if value != plain:
            yield (
                f"model.{name}: {value!r} is for the family 'bert' (got 'gpt'). "
                f"Take {plain!r}, or model.family: bert."
            )
    if objective == "mlm":
        yield (
            "model.family: 'gpt' sees what comes before alone, but data.objective is 'mlm'. Take "
            "'bert', or the objective 'causal' or 'ul2'."
        )


def _bert(config: RunConfig) -> Iterator[str]:
    model, data = config.model, config.data
    for name, value, allowed in (
        ("positions", model.positions, ("learned",)),
        ("norm", model.norm, ("layernorm",)),
        ("activation", model.activation, ("gelu_exact", "gelu")),
        ("bias", model.bias, (True,)),
    ):
        if value not in allowed:
            yield (
                f"model.{name}: the family 'bert' has {' or '.join(map(repr, allowed))} "
                f"(got {value!r})."
            )
    if data.objective != "mlm":
        yield (
            f"data.objective: the family 'bert' learns by 'mlm' (got {data.objective!r}). Change "
            "it, or take model.family: gpt."
        )
    if data.mlm.sentence_pairs != "none" and model.token_types == 1:
        yield (
            "model.token_types: the two segments of data.mlm.sentence_pairs need 2, or 0 for a "
            "model that does not tell them apart (got 1)."
        )


def _sequence_parallel(config: RunConfig) -> Iterator[str]:
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        yield (
            "parallel.sequence_parallel: shares the sequence among tensor-parallel ranks, but "
            "parallel.tensor is 1. Set it to 2 or more, or sequence_parallel: false."
        )
