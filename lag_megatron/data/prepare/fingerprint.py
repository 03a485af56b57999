"""The fingerprint of prepared data, and the tokenizer that goes into it."""

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lag_megatron.atomic_io import flush_to_disk
from lag_megatron.config import DataConfig
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.prepare.corpus import Corpus
from lag_megatron.data.prepare.train_tokenizer import train_tokenizer
from lag_megatron.planning.blend import Blend

_FORMAT = 2
# More text barely changes the merges: 8 MB for 4096 tokens, 100 MB for 50 thousand.
_TRAINING_BYTES_PER_TOKEN = 2048


def data_fingerprint(config: DataConfig, *, content: Any, tokenizer: Tokenizer | None) -> str:
    """32 hex digits over everything that the prepared files depend on.

    Args:
        config: the settings.
        content: hashes of the texts, as JSON.
        tokenizer: None is one that is trained on them.
    """
    settings = dataclasses.asdict(config.tokenizer)
    del settings["path"]
    values = {
        "format": _FORMAT,
        "content": content,
        "tokenizer": tokenizer.digest if tokenizer else settings,
        "sentences": config.objective == "mlm",
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def tokenizer_file(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that the configuration names, or None where one is to be trained.

    Raises:
        DataError: if it cannot be read or used.
    """
    if config.tokenizer.type != "file":
        return None
    path = Path(config.tokenizer.path or "").expanduser()
    return load_tokenizer(path, sentinels=config.tokenizer.sentinels)


def train_on(
    config: DataConfig,
    corpora: Sequence[Corpus],
    validation: Sequence[np.ndarray],
    weights: Sequence[float],
) -> Tokenizer:
    """Train a tokenizer on texts by weight, the same one for the same texts and settings.

    Args:
        config: kind and size of the tokenizer, and the seed.
        corpora: the texts.
        validation: documents of each that are left out, (documents,) bool.
        weights: of the corpora.
    """
    total_bytes = config.tokenizer.vocab_size * _TRAINING_BYTES_PER_TOKEN

    def sample() -> Iterator[str]:
        for corpus, held_out, share in zip(corpora, validation, Blend(weights).shares, strict=True):
            yield from _some(corpus, ~held_out, limit=int(total_bytes * share), seed=config.seed)

    return train_tokenizer(config.tokenizer, sample())


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json so that it is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    tokenizer.save(part)
    flush_to_disk(part)
    part.rename(path)


def _some(corpus: Corpus, allowed: np.ndarray, *, limit: int, seed: int) -> Iterator[str]:
    """About ``limit`` bytes of the documents allowed, evenly from all of them."""
    candidates = np.flatnonzero(allowed)
    total = int(corpus.sizes[candidates].sum())
    wanted = allowed
    if total > limit:
        count = max(1, math.ceil(len(candidates) * limit / total))
        wanted = np.zeros_like(allowed)
        wanted[candidates[random.Random(seed).sample(range(len(candidates)), count)]] = True
    left = limit
    for text in corpus.texts(wanted):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
