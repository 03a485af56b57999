"""Checks of the text sources, the tokenizer and the objective."""

import math
import re
from collections.abc import Iterator

from lag_megatron.config.schema.data import DataConfig, SourceConfig, TokenizerConfig
from lag_megatron.config.schema.run import RunConfig
from lag_megatron.config.validation.objective import objective_problems

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Files in a mixture's folder, where the folders of its sources may be written as well, and the
# suffix of unfinished folders.
_TAKEN = ("tokenizer.json", "mixture.json", "meta.json", "draft.json", "lock")
_UNFINISHED = ".part"


def data_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the data's settings, one line each."""
    data = config.data
    if data.mixture:
        yield from _unused(data)
        yield from _mixture(data.mixture)
    else:
        yield from _source(data, "data")
    if not 0 < data.validation_fraction < 1:
        yield f"data.validation_fraction: must be in (0, 1) (got {data.validation_fraction})."
    yield from _tokenizer(data.tokenizer)
    yield from objective_problems(config)


def _unused(data: DataConfig) -> Iterator[str]:
    default = DataConfig()
    for name in ("source", "paths", "text_key"):
        got = getattr(data, name)
        if got != getattr(default, name):
            yield (
                f"data.{name}: is not used beside data.mixture, whose sources have their own (got "
                f"{list(got) if name == 'paths' else got!r}). Remove it, or set data.mixture: []."
            )


def _source(source: DataConfig | SourceConfig, where: str) -> Iterator[str]:
    if source.source == "stdlib" and source.paths:
        yield f"{where}.paths: the source 'stdlib' takes no paths (got {list(source.paths)})."
    if source.source != "stdlib" and not source.paths:
        yield (
            f"{where}.paths: the source {source.source!r} needs at least one file, glob or folder."
        )
    if source.source == "prepared" and len(source.paths) > 1:
        yield (
            f"{where}.paths: the source 'prepared' is one folder (got {list(source.paths)}). "
            "Draw from several by data.mixture."
        )


def _mixture(sources: tuple[SourceConfig, ...]) -> Iterator[str]:
    names = [source.name for source in sources]
    for number, source in enumerate(sources):
        where = f"data.mixture.{number}"
        if not _NAME.fullmatch(source.name):
            yield (
                f"{where}.name: must be letters, digits, '_', '-' and '.', with a letter or digit "
                f"first: it names a folder (got {source.name!r})."
            )
        elif source.name in _TAKEN or source.name.endswith(_UNFINISHED):
            yield (
                f"{where}.name: must not be {', '.join(_TAKEN)} or end in {_UNFINISHED}, which are "
                f"names of the mixture's own files (got {source.name!r})."
            )
        if names.index(source.name) != number:
            yield f"{where}.name: {source.name!r} is taken by another source. Names must differ."
        if not 0 < source.weight < math.inf:
            yield f"{where}.weight: must be above 0 and finite (got {source.weight})."
        yield from _source(source, where)


def _tokenizer(tokenizer: TokenizerConfig) -> Iterator[str]:
    if tokenizer.type == "file" and not tokenizer.path:
        yield "data.tokenizer.path: the type 'file' needs the path of a tokenizer.json."
    if tokenizer.type != "file" and tokenizer.path:
        yield (
            f"data.tokenizer.path: only the type 'file' reads one (got {tokenizer.path!r} with "
            f"type {tokenizer.type!r}). Set the type to 'file', or remove the path."
        )
    if tokenizer.type == "bpe" and tokenizer.vocab_size < 257:
        yield (
            "data.tokenizer.vocab_size: byte-level BPE needs 256 bytes and an end of document, "
            f"so at least 257 (got {tokenizer.vocab_size})."
        )
    if tokenizer.type == "wordpiece" and tokenizer.vocab_size < 257:
        yield (
            "data.tokenizer.vocab_size: WordPiece needs its special tokens and an alphabet, each "
            f"letter twice, so at least 257 (got {tokenizer.vocab_size})."
        )
    if tokenizer.sentinels < 0:
        yield f"data.tokenizer.sentinels: must be 0 or more (got {tokenizer.sentinels})."
