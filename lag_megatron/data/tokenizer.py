"""Text to token ids: a byte-level BPE trained here, or any Hugging Face ``tokenizer.json``."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, trainers

from lag_megatron.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
_END_TOKENS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")
_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 4 << 20


class Tokenizer:
    """A Hugging Face tokenizer with the attributes that Megatron's ``GPTDatasetConfig`` reads.

    Attributes:
        eod: id of the end-of-document token.
        vocab_size: highest id plus one, the end of document included.
        pad: -1, which no token has, so that no token is ever masked out as padding.
        unique_identifiers: what tells this tokenizer from others.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eod: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        # Text that spells out "<|endoftext|>" is text; only the end of a document ends one.
        backend.encode_special_tokens = True
        self._backend = backend
        self.eod = eod
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.pad = -1
        self.digest = xxhash.xxh3_128_hexdigest(backend.to_str().encode())
        self.unique_identifiers = OrderedDict(tokenizer=self.digest, vocab_size=self.vocab_size)

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the token ids of each text, end of document last, as a 1-D int64 array.

        Texts are encoded a few megabytes at a time, by as many threads as there are cores. Texts
        above a megabyte are cut after a line and encoded piece by piece, so memory stays bounded.
        """
        parts: list[np.ndarray] = []
        for batch in _batches(_pieces(texts)):
            strings = [piece for piece, _ in batch]
            encodings = self._backend.encode_batch_fast(strings, add_special_tokens=False)
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                parts.append(np.asarray(encoding.ids, dtype=np.int64))
                if last:
                    yield np.concatenate([*parts, np.asarray([self.eod])])
                    parts = []

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, ends of documents spelled out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json`` that :func:`load_tokenizer` and ``transformers`` read."""
        path.write_text(self._backend.to_str(), encoding="utf-8")


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, the same one for the same texts in the same order.

    Args:
        texts: what to count pairs in.
        vocab_size: tokens at most, 256 bytes and the end of document included.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eod=backend.get_vocab()[END_OF_DOCUMENT])


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a Hugging Face ``tokenizer.json``.

    Raises:
        DataError: if the file is missing or invalid, or names no end-of-document token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.tokenizer.path: {path} cannot be read: {error}. Expected a tokenizer.json "
            "of Hugging Face, or use data.tokenizer.type: bpe."
        ) from None
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise DataError(
            f"data.tokenizer.path: {path} is not a tokenizer.json of Hugging Face: {error}. "
            "Save one with tokenizer.save_pretrained(folder), or use data.tokenizer.type: bpe."
        ) from error
    ids = [backend.token_to_id(token) for token in _END_TOKENS]
    eod = next((number for number in ids if number is not None), None)
    if eod is None:
        raise DataError(
            f"data.tokenizer.path: {path} has no end-of-document token. Expected one of "
            f"{', '.join(_END_TOKENS)}. Add one as a special token, and save it again."
        )
    return Tokenizer(backend, eod=eod)


def padded_vocab_size(vocab_size: int) -> int:
    """Round up to a multiple of 128, Megatron's ``--make-vocab-size-divisible-by``."""
    return -(-vocab_size // 128) * 128


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each text, cut after a line where it is long, with whether its end is reached."""
    for text in texts:
        start = 0
        while len(text) - start > _PIECE_CHARACTERS:
            limit = start + _PIECE_CHARACTERS
            cut = text.rfind("\n", start, limit) + 1 or limit
            yield text[start:cut], False
            start = cut
        yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
