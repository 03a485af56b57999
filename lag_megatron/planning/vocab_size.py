"""The number of embedding rows, estimated where the tokenizer does not exist yet."""

from pathlib import Path

from lag_megatron.config import RunConfig, padded_vocab_size
from lag_megatron.config.schema.span_corruption import MODES
from lag_megatron.errors import ConfigError
from lag_megatron.small_files import read_json


def estimate_vocab_size(config: RunConfig) -> tuple[int, str]:
    """Rows of the embedding, and where the number comes from.

    ``auto`` is exact only once the tokenizer exists: until then it is the configured size, rounded
    up as for training.

    Raises:
        ConfigError: if the file of the tokenizer, or of prepared text, is not what it should be.
    """
    if isinstance(config.model.vocab_size, int):
        return config.model.vocab_size, "given"
    tokenizer = config.data.tokenizer
    added = tokenizer.sentinels + len(MODES) if tokenizer.sentinels else 0
    for folder in _prepared_folders(config):
        return padded_vocab_size(_prepared_size(folder / "meta.json")), f"read from {folder}"
    if tokenizer.type != "file":
        size = padded_vocab_size(tokenizer.vocab_size + added)
        return size, "an estimate from data.tokenizer.vocab_size"
    if tokenizer.path and Path(tokenizer.path).is_file():
        return padded_vocab_size(
            _tokenizer_size(Path(tokenizer.path)) + added
        ), f"read from {tokenizer.path}"
    return padded_vocab_size(
        tokenizer.vocab_size + added
    ), f"a guess: {tokenizer.path} is not there"


def _prepared_folders(config: RunConfig) -> list[Path]:
    """Folders of prepared text that are there; one decides the tokenizer of all."""
    data = config.data
    sources = data.mixture or (data,)
    paths = [path for source in sources if source.source == "prepared" for path in source.paths]
    return [Path(path) for path in paths if (Path(path) / "meta.json").is_file()]


def _prepared_size(path: Path) -> int:
    """The vocabulary of prepared text."""
    meta = read_json(
        path,
        what="the description of prepared text",
        error=ConfigError,
        advice="Prepare the text again.",
    )
    size = meta.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ConfigError(
            f"{path}: expected vocab_size to be a whole number above 0 (got {size!r}). Prepare "
            "the text again."
        )
    return size


def _tokenizer_size(path: Path) -> int:
    """Largest token number of a Hugging Face ``tokenizer.json``, plus one."""
    tree = read_json(path, what="a tokenizer.json of Hugging Face", error=ConfigError)
    try:
        vocab = tree["model"]["vocab"]
        numbers = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        added = [token["id"] for token in tree.get("added_tokens", [])]
        return 1 + int(max([*numbers, *added]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"data.tokenizer.path: {path} is not a Hugging Face tokenizer.json ({error!r})."
        ) from None
