"""Small texts as prepared files, without the tools that prepare them."""

import random
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from lag_megatron.data.datasets.tokenizer import Tokenizer

WORDS = "growing layers stacked deeper trains faster than a model begun whole by half"


def stories(count: int, *, seed: int = 0, sentences: int = 12) -> list[str]:
    """Texts of 1 to ``sentences`` sentences of 3 to 12 words."""
    draw = random.Random(seed)
    return [
        " ".join(
            " ".join(draw.choices(WORDS.split(), k=draw.randint(3, 12))).capitalize() + "."
            for _ in range(draw.randint(1, sentences))
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Text:
    """What training and validation data ask of a prepared text."""

    folder: Path
    made_by: Tokenizer
    train_tokens: int
    validation_tokens: int

    @property
    def train_prefix(self) -> str:
        return str(self.folder / "train")

    @property
    def validation_prefix(self) -> str:
        return str(self.folder / "validation")

    def tokenizer(self) -> Tokenizer:
        return self.made_by


def write_documents(
    prefix: Path, texts: list[str], tokenizer: Tokenizer, *, sentences: bool
) -> int:
    """Write ``prefix.bin`` and ``prefix.idx``; return the tokens in them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(10_000))
    tokens = 0
    if sentences:
        for ids, lengths in tokenizer.encode_documents(texts, sentences=True):
            builder.add_document(ids, lengths)
            tokens += len(ids)
    else:
        for ids in tokenizer.encode_documents(texts):
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def write_text(folder: Path, tokenizer: Tokenizer, *, sentences: bool) -> Text:
    """Write 80 stories to train on and 40 to validate on."""
    counts = [
        write_documents(folder / name, stories(count, seed=count), tokenizer, sentences=sentences)
        for name, count in (("train", 80), ("validation", 40))
    ]
    return Text(folder, tokenizer, *counts)
