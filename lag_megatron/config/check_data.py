"""What text, tokenizer and objective must satisfy."""

from collections.abc import Iterator

from lag_megatron.config.schema import RunConfig


def data_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the data's settings, one line each."""
    data = config.data
    if data.source == "stdlib" and data.paths:
        yield f"data.paths: the source 'stdlib' takes no paths (got {list(data.paths)})."
    if data.source != "stdlib" and not data.paths:
        yield f"data.paths: the source {data.source!r} needs at least one file, glob or folder."
    if not 0 < data.validation_fraction < 1:
        yield f"data.validation_fraction: must be in (0, 1) (got {data.validation_fraction})."
    if data.tokenizer.type == "file" and not data.tokenizer.path:
        yield "data.tokenizer.path: the type 'file' needs the path of a tokenizer.json."
    if data.tokenizer.type == "bpe" and data.tokenizer.vocab_size < 257:
        yield (
            "data.tokenizer.vocab_size: byte-level BPE needs 256 bytes and an end of document, "
            f"so at least 257 (got {data.tokenizer.vocab_size})."
        )
