"""A Hugging Face ``tokenizer.json`` with the attributes that Megatron's datasets read."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import numpy as np
import tokenizers
import xxhash

from lag_megatron.config.schema.span_corruption import MODES
from lag_megatron.data.datasets.sentences import split_sentences
from lag_megatron.errors import DataError
from lag_megatron.small_files import read_text

END_OF_DOCUMENT = "<|endoftext|>"
# The modes of UL2's denoisers: regular, sequential (prefix), extreme.
CONTINUATION = "##"

_END_TOKENS = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "[SEP]", "<eos>")
_NAMES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "padding": ("[PAD]", "<pad>"),
}
# Megatron passes over documents with a sentence of more than 512 tokens, and cuts off what a
# sample's last sentence has too much.
_SENTENCE_TOKENS = 128
_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 4 << 20


class Tokenizer:
    """A Hugging Face tokenizer with the attributes that Megatron's datasets read.

    Attributes:
        eod: id of the end-of-document token.
        vocab_size: highest id plus one, the end of document included.
        pad: -1, which no token has, so that no token is ever masked out as padding.
        cls: id of the token that begins a masked sample, or None.
        sep: id of the token that ends each segment of a masked sample, or None.
        mask: id of the token in a masked token's place, or None.
        padding: id of the token that fills a sample up, or None.
        sentinels: ids of ``<extra_id_0>``, ``<extra_id_1>``, ...: what stands for a span taken out.
        modes: id of each of UL2's mode tokens that the vocabulary has, by name.
        unique_identifiers: what Megatron's caches distinguish tokenizers by.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eod: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        # Text that spells out "<|endoftext|>" is text; only the end of a document ends one.
        backend.encode_special_tokens = True
        self._backend = backend
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.eod = eod
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.pad = -1
        self.cls = self._first_of("cls")
        self.sep = self._first_of("sep")
        self.mask = self._first_of("mask")
        self.padding = self._first_of("padding")
        self.sentinels = tuple(_sentinels_of(self._vocabulary))
        self.modes = {name: self._vocabulary[name] for name in MODES if name in self._vocabulary}
        self.digest = xxhash.xxh3_128_hexdigest(backend.to_str().encode())
        self.unique_identifiers = OrderedDict(tokenizer=self.digest, vocab_size=self.vocab_size)

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Token of each id."""
        return {number: token for token, number in self._vocabulary.items()}

    @cached_property
    def words(self) -> np.ndarray:
        """Ids of all tokens that text can give, sorted, int64: no special ones."""
        added = self._backend.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        return np.asarray(sorted(set(self._vocabulary.values()) - special), dtype=np.int64)

    @cached_property
    def continues(self) -> np.ndarray:
        """Whether each id goes on with the word before it (``##`` of WordPiece), (vocab,) bool."""
        table = np.zeros(self.vocab_size, dtype=bool)
        for token, number in self._vocabulary.items():
            table[number] = token.startswith(CONTINUATION)
        return table

    @overload
    def encode_documents(
        self, texts: Iterable[str], *, sentences: Literal[False] = False
    ) -> Iterator[np.ndarray]: ...

    @overload
    def encode_documents(
        self, texts: Iterable[str], *, sentences: Literal[True]
    ) -> Iterator[tuple[np.ndarray, list[int]]]: ...

    def encode_documents(
        self, texts: Iterable[str], *, sentences: bool = False
    ) -> Iterator[np.ndarray] | Iterator[tuple[np.ndarray, list[int]]]:
        """Yield the token ids of each text as a 1-D int64 array, the end of document last.

        Texts are encoded a few megabytes at a time, by as many threads as there are cores. Texts
        above a megabyte are cut after a line and encoded piece by piece, so memory stays bounded.

        With ``sentences``, yield (ids, lengths) of each text: its sentences one after another, as
        :func:`split_sentences` finds them, and the tokens of each; there is no end of document,
        and a sentence of more than 128 tokens is cut between two words.
        """
        return self._as_sentences(texts) if sentences else self._whole(texts)

    def _whole(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        end = np.asarray([self.eod])
        parts: list[np.ndarray] = []
        for batch in _batches(_pieces(texts)):
            encoded = self._encode([piece for piece, _ in batch])
            for ids, (_, last) in zip(encoded, batch, strict=True):
                parts.append(ids)
                if last:
                    yield np.concatenate([*parts, end])
                    parts = []

    def _as_sentences(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, list[int]]]:
        parts: list[np.ndarray] = []
        for batch in _batches(_pieces(texts)):
            split = [split_sentences(piece) for piece, _ in batch]
            encoded = iter(self._encode([sentence for found in split for sentence in found]))
            for found, (_, last) in zip(split, batch, strict=True):
                for _ in found:
                    parts += self._short(next(encoded))
                if last:
                    empty = np.zeros(0, dtype=np.int64)
                    yield np.concatenate([empty, *parts]), [len(part) for part in parts]
                    parts = []

    def _encode(self, strings: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _short(self, ids: np.ndarray) -> list[np.ndarray]:
        """A sentence, cut before the first token of a word where it is too long."""
        parts = []
        while len(ids) > _SENTENCE_TOKENS:
            starts = np.flatnonzero(~self.continues[ids[1 : _SENTENCE_TOKENS + 1]])
            cut = int(starts[-1]) + 1 if len(starts) else _SENTENCE_TOKENS
            parts.append(ids[:cut])
            ids = ids[cut:]
        return [*parts, ids] if len(ids) else parts

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, ends of documents spelled out."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json`` that :func:`load_tokenizer` and ``transformers`` read."""
        path.write_text(self._backend.to_str(), encoding="utf-8")

    def _first_of(self, role: str) -> int | None:
        return next((self._vocabulary[n] for n in _NAMES[role] if n in self._vocabulary), None)


def load_tokenizer(path: Path, *, sentinels: int = 0) -> Tokenizer:
    """Read a Hugging Face ``tokenizer.json``.

    Args:
        path: of the file.
        sentinels: how many the tokenizer has at least; those that it lacks, and UL2's mode tokens,
            are added at the vocabulary's end.

    Raises:
        DataError: if the file is missing or invalid, or names no end-of-document token.
    """
    text = read_text(
        path,
        what="a tokenizer.json of Hugging Face",
        error=DataError,
        advice="Give the path of one, or use data.tokenizer.type: bpe.",
    )
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise DataError(
            f"data.tokenizer.path: {path} is not a tokenizer.json of Hugging Face: {error}. "
            "Save one with tokenizer.save_pretrained(folder), or use data.tokenizer.type: bpe."
        ) from error
    add_sentinels(backend, sentinels)
    ids = [backend.token_to_id(token) for token in _END_TOKENS]
    eod = next((number for number in ids if number is not None), None)
    if eod is None:
        raise DataError(
            f"data.tokenizer.path: {path} has no end-of-document token. Expected one of "
            f"{', '.join(_END_TOKENS)}. Add one as a special token, and save it again."
        )
    return Tokenizer(backend, eod=eod)


def add_sentinels(backend: tokenizers.Tokenizer, count: int) -> None:
    """Add UL2's mode tokens and sentinels up to ``count``, where they are not there already.

    Raises:
        DataError: if the vocabulary's ids have gaps, so that new ids would collide.
    """
    if not count:
        return
    names = [*(f"<extra_id_{number}>" for number in range(count)), *MODES]
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise DataError(
            "data.tokenizer.sentinels: the tokenizer's ids have gaps, so tokens added to it would "
            "share ids with others. Use a tokenizer whose ids run from 0 without gaps, or add "
            f"{names[0]} to {names[count - 1]} and {', '.join(MODES)} to it and save it again."
        )


def _sentinels_of(vocabulary: dict[str, int]) -> Iterator[int]:
    number = 0
    while (token := f"<extra_id_{number}>") in vocabulary:
        yield vocabulary[token]
        number += 1


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
