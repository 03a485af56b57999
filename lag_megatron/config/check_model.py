"""What the model's shape must satisfy."""

from collections.abc import Iterator

from lag_megatron.config.schema import RunConfig


def model_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the shape, one line each."""
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
    for path, value, name, divisor in divisions:
        if value % divisor:
            yield f"{path}: {value} is not a multiple of {name} = {divisor}."
    if not 0 <= model.dropout < 1:
        yield f"model.dropout: must be in [0, 1) (got {model.dropout})."
