"""A folder of tokens, tokenizer and metadata, written by ``prepare`` and opened by every rank."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lag_megatron.data.datasets.checksums import checksum, require_checksum
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.errors import DataError
from lag_megatron.small_files import read_json

META = "meta.json"
TOKENIZER = "tokenizer.json"
UNIGRAMS = "unigrams.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A complete folder: train and validation ``.bin`` and ``.idx``, tokenizer.json, meta.json.

    Attributes:
        folder: where the files are.
        digest: 32 hex digits over the texts and all that shapes the files.
        source: kind of the source.
        sentences: whether a document is stored as its sentences (for mlm) or as one sequence.
        tokenizer_digest: 32 hex digits over the tokenizer.
        vocab_size: of the tokenizer, the end of document included, not padded.
        train_tokens: tokens to train on, ends of documents included.
        validation_tokens: likewise, of documents that are never trained on.
        train_documents: documents to train on.
        validation_documents: documents to validate on.
        unigram_entropy: nats per validation token under the training tokens' frequencies (each
            count plus one): the loss of a model that predicts token frequencies alone.
        skipped_files: documents passed over, being empty or (in the standard library) not UTF-8.
        bytes: bytes of text.
        content_hash: 32 hex digits over the texts and their order.
        files: bytes and xxh3 (128 bit, hex) of each file beside meta.json.
    """

    folder: Path
    digest: str
    source: str
    sentences: bool
    tokenizer_digest: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int
    unigram_entropy: float
    skipped_files: int
    bytes: int
    content_hash: str
    files: dict[str, tuple[int, str]]

    @staticmethod
    def open(folder: Path) -> "PreparedData":
        """Read what :func:`lag_megatron.data.prepare_data` wrote, on any rank.

        Raises:
            DataError: if this host does not see the folder, or it is incomplete or damaged.
        """
        values = read_meta(folder, META)
        try:
            files = {name: (int(size), str(digest)) for name, (size, digest) in
                     values.pop("files").items()}  # fmt: skip
            prepared = PreparedData(folder=folder, files=files, **values)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise _unreadable(folder / META, error) from None
        for name, (size, _) in files.items():
            _require_size(folder / name, size)
        return prepared

    def verify(self) -> None:
        """Read all files and compare their checksums.

        Raises:
            DataError: naming the file that was changed.
        """
        for name in self.files:
            self._require_sound(name)

    @property
    def sources(self) -> tuple["PreparedSource", ...]:
        """This folder as the only source of a mixture."""
        return (PreparedSource(name="", weight=1.0, data=self),)

    @property
    def train_prefix(self) -> str:
        """Path of the training tokens without ``.bin`` or ``.idx``."""
        return str(self.folder / "train")

    @property
    def validation_prefix(self) -> str:
        """Path of the validation tokens without ``.bin`` or ``.idx``."""
        return str(self.folder / "validation")

    @property
    def tokenizer_path(self) -> Path:
        """Path of the ``tokenizer.json``."""
        return self.folder / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer.

        Raises:
            DataError: if its file is not the one that was written.
        """
        self._require_sound(TOKENIZER)
        return load_tokenizer(self.tokenizer_path)

    def unigrams(self) -> np.ndarray:
        """How often each token occurs in (training, validation), (2, vocabulary) int64.

        Raises:
            DataError: if its file is not the one that was written.
        """
        self._require_sound(UNIGRAMS)
        return np.load(self.folder / UNIGRAMS, allow_pickle=False)

    def _require_sound(self, name: str) -> None:
        if name in self.files:
            path, (_, expected) = self.folder / name, self.files[name]
            require_checksum(path, got=checksum(path), expected=expected)

    def facts(self) -> dict[str, Any]:
        """What a report says of the text, as JSON."""
        names = ("source", "bytes", "train_tokens", "validation_tokens", "train_documents",
                 "validation_documents", "skipped_files", "content_hash")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def write_meta(self) -> None:
        """Write meta.json, which makes the folder complete."""
        values = dataclasses.asdict(self)
        del values["folder"]
        text = json.dumps(values, indent=2) + "\n"
        (self.folder / META).write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSource:
    """One source of a mixture.

    Attributes:
        name: in the configuration; empty where there is only one.
        weight: relative to the others'.
        data: its folder.
    """

    name: str
    weight: float
    data: PreparedData


def read_meta(folder: Path, name: str) -> dict[str, Any]:
    """Read the JSON file that makes a folder complete.

    Raises:
        DataError: if it is not there or is not an object.
    """
    path = folder / name
    if not path.exists():
        raise DataError(
            f"this host does not see the prepared data {folder} (no {name} there); put the "
            "run directory on a file system that all hosts share."
        )
    values: dict[str, Any] = read_json(
        path,
        what="the description of prepared data",
        error=DataError,
        advice="Delete the folder; the next run prepares it again.",
    )
    return values


def _require_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        got = "is missing" if found is None else f"has {found} bytes"
        raise DataError(
            f"{path}: {got}, expected {size} bytes: the prepared data was damaged. "
            f"Delete {path.parent} and prepare it again."
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be read as prepared data: {error}. "
        "Delete the folder; the next run prepares it again."
    )
