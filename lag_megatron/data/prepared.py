"""Prepared data: a folder with tokens, tokenizer and what is known about them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.errors import DataError

META = "meta.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A complete folder: train and validation ``.bin`` and ``.idx``, tokenizer.json, meta.json.

    Attributes:
        folder: where the files are.
        vocab_size: of the tokenizer, the end of document included, not padded.
        train_tokens: tokens to train on, ends of documents included.
        validation_tokens: likewise, of documents that are never trained on.
        train_documents: documents to train on.
        validation_documents: documents to validate on.
        unigram_entropy: nats per validation token under the training tokens' frequencies (each
            count plus one): the loss of a model that knows nothing but how common a token is.
        skipped_files: documents passed over, being empty or (in the standard library) not UTF-8.
        bytes: bytes of text.
        content_hash: 32 hex digits over the texts and their order.
        seconds: wall time that preparing took.
    """

    folder: Path
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int
    unigram_entropy: float
    skipped_files: int
    bytes: int
    content_hash: str
    seconds: float

    @staticmethod
    def open(folder: Path) -> "PreparedData":
        """Read what :func:`lag_megatron.data.prepare_data` wrote, on any rank.

        Raises:
            DataError: if this host does not see the folder, or it is incomplete or damaged.
        """
        try:
            values = json.loads((folder / META).read_text(encoding="utf-8"))
            return PreparedData(folder=folder, **values)
        except FileNotFoundError:
            raise DataError(
                f"this host does not see the prepared data {folder} (no {META} there); put the "
                "run directory on a file system that all hosts share."
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{folder / META}: cannot be read as prepared data: {error}. "
                "Delete the folder; the next run prepares it again."
            ) from None

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
        """Load the tokenizer."""
        return load_tokenizer(self.tokenizer_path)

    def write_meta(self) -> None:
        """Write meta.json, which makes the folder complete."""
        values = dataclasses.asdict(self)
        del values["folder"]
        text = json.dumps(values, indent=2) + "\n"
        (self.folder / META).write_text(text, encoding="utf-8")
