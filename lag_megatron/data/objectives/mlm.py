"""Masked language modelling: BERT's samples of one segment or two.

Megatron-Core cuts documents into samples (``build_mapping``). A sample is made as in
its ``BERTMaskedWordPieceDataset``, but with array operations: token by token, as there, it takes
several milliseconds, more than a GPU needs to train on it.
"""

import numpy as np
import torch
import xxhash
from megatron.core.datasets.helpers import build_mapping
from megatron.core.datasets.indexed_dataset import IndexedDataset

from lag_megatron.config import MlmConfig
from lag_megatron.data.datasets.tokenizer import Tokenizer
from lag_megatron.data.objectives.masking import choose_positions, replacements
from lag_megatron.errors import DataError

_SPECIAL = 3  # [CLS] A [SEP] B [SEP]


class MlmSamples:
    """One pass over all documents, in an order of samples drawn from the seed.

    A sample is a run of whole sentences of one document, cut at its ends where it is too long.

    Args:
        documents: one sequence a sentence.
        tokenizer: the one that made them.
        mlm: how tokens are masked and segments paired.
        seq_length: tokens per sample, special ones and padding included.
        seed: of the order, the segments and the masks.

    Raises:
        DataError: if the tokenizer lacks [CLS], [SEP] or [MASK], or ``##`` for whole words; or if
            there are no two documents to pair segments of.
    """

    def __init__(
        self,
        documents: IndexedDataset,
        tokenizer: Tokenizer,
        mlm: MlmConfig,
        *,
        seq_length: int,
        seed: int,
    ) -> None:
        self._cls, self._sep, self._mask = _special_tokens(tokenizer, mlm)
        self._documents = documents
        self._tokenizer = tokenizer
        self._mlm = mlm
        self._seq_length = seq_length
        self._seed = seed
        self._limit = seq_length - _SPECIAL
        self._filled = np.flatnonzero(np.diff(documents.document_indices))
        if mlm.sentence_pairs == "next" and len(self._filled) < 2:
            raise DataError(
                "data.mlm.sentence_pairs: 'next' takes second segments from other documents, but "
                f"{documents.path_prefix} has {len(self._filled)} that are not empty. Use a text "
                "of more documents, or 'order'."
            )
        self._runs = _runs_of_sentences(documents, self._limit, mlm.sentence_pairs, seed)

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample; s is the sequence's length, m the most predictions of any sample.

        Returns:
            int64 ``tokens``, ``token_types``, ``position_ids`` and bool ``padding_mask`` (True is a
            token), (s,); int64 ``masked_positions`` and ``labels`` and float32 ``loss_mask``, (m,),
            zero where the sample has fewer predictions; with pairs of segments int64
            ``sentence_labels``, (), 1 where the second does not follow the first.
        """
        begin, end, _ = (int(value) for value in self._runs[index])
        # The streams of RandomState are frozen (NEP 19): a newer NumPy gives the same samples.
        rng = np.random.RandomState(xxhash.xxh32_intdigest(f"{self._seed} {index}".encode()))
        first, second, label = self._segments(begin, end, rng)
        first, second = _trim(first, second, self._limit, rng)
        tokens, special, types = self._join(first, second)
        positions = self._positions(tokens, special, rng)
        labels = tokens[positions]
        tokens[positions] = replacements(
            labels, mask=self._mask, words=self._tokenizer.words, rng=rng
        )
        sample = self._padded(tokens, types, positions, labels)
        if self._mlm.sentence_pairs != "none":
            sample["sentence_labels"] = torch.tensor(label)
        return sample

    def _segments(
        self, begin: int, end: int, rng: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Both segments of the sentences ``begin`` to ``end``, and their label."""
        sentences = self._documents[begin:end]
        if self._mlm.sentence_pairs == "none":
            whole = np.concatenate(sentences)
            return whole, whole[:0], 0
        pivot = rng.randint(1, len(sentences))
        first, second = np.concatenate(sentences[:pivot]), np.concatenate(sentences[pivot:])
        if rng.random_sample() < 0.5:
            return first, second, 0
        if self._mlm.sentence_pairs == "order":
            return second, first, 1
        return first, self._from_another_document(begin, self._limit - len(first), rng), 1

    def _from_another_document(
        self, sentence: int, max_tokens: int, rng: np.random.RandomState
    ) -> np.ndarray:
        """About ``max_tokens`` of another document than ``sentence``'s, from a random sentence on.

        Devlin et al. use the sentences that these replace for the next sample; here they are left
        out of this pass.
        """
        bounds = self._documents.document_indices
        own = np.searchsorted(bounds, sentence, side="right") - 1
        drawn = rng.randint(len(self._filled) - 1)
        other = self._filled[drawn + (self._filled[drawn] >= own)]
        start = rng.randint(bounds[other], bounds[other + 1])
        lengths = np.cumsum(self._documents.sequence_lengths[start : bounds[other + 1]])
        stop = start + min(int(np.searchsorted(lengths, max_tokens)) + 1, len(lengths))
        return np.concatenate(self._documents[int(start) : int(stop)])

    def _join(
        self, first: np.ndarray, second: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[CLS] A [SEP], or [CLS] A [SEP] B [SEP]: tokens, which are special, and token types."""
        cls, sep = np.asarray([self._cls]), np.asarray([self._sep])
        parts = [cls, first, sep, second, sep] if len(second) else [cls, first, sep]
        tokens = np.concatenate(parts).astype(np.int64)
        special = np.zeros(len(tokens), dtype=bool)
        special[[0, len(first) + 1, -1]] = True
        types = (np.arange(len(tokens)) >= len(first) + 2).astype(np.int64)
        return tokens, special, types

    def _positions(
        self, tokens: np.ndarray, special: np.ndarray, rng: np.random.RandomState
    ) -> np.ndarray:
        probability = self._mlm.probability
        wanted = max(1, round(len(tokens) * probability))
        candidates = np.flatnonzero(~special)
        starts = None
        if self._mlm.whole_word:
            starts = ~self._tokenizer.continues[tokens[candidates]] | special[candidates - 1]
        return choose_positions(candidates, starts, min(wanted, self._predictions), rng)

    @property
    def _predictions(self) -> int:
        return self._mlm.predictions(self._seq_length)

    def _padded(
        self, tokens: np.ndarray, types: np.ndarray, positions: np.ndarray, labels: np.ndarray
    ) -> dict[str, torch.Tensor]:
        length, width = self._seq_length, self._predictions
        return {
            "tokens": _fill(tokens, length, self._tokenizer.padding or 0),
            "token_types": _fill(types, length, 0),
            "position_ids": torch.arange(length),
            "padding_mask": torch.arange(length) < len(tokens),
            "masked_positions": _fill(positions, width, 0),
            "labels": _fill(labels, width, 0),
            "loss_mask": (torch.arange(width) < len(positions)).float(),
        }


def _special_tokens(tokenizer: Tokenizer, mlm: MlmConfig) -> tuple[int, int, int]:
    """The ids of [CLS], [SEP] and [MASK]."""
    found = {"[CLS]": tokenizer.cls, "[SEP]": tokenizer.sep, "[MASK]": tokenizer.mask}
    if missing := [name for name, number in found.items() if number is None]:
        raise DataError(
            f"data.tokenizer: the objective mlm needs {', '.join(found)} (or <s>, </s>, <mask>), "
            f"but the tokenizer has no {', '.join(missing)}. Use the type wordpiece, or a "
            "tokenizer.json that has them."
        )
    if mlm.whole_word and not tokenizer.continues.any():
        raise DataError(
            "data.mlm.whole_word: the tokenizer has no tokens that begin with '##', which tell the "
            "pieces of a word. Use a WordPiece tokenizer, or whole_word: false."
        )
    cls, sep, mask = (int(number) for number in found.values() if number is not None)
    return cls, sep, mask


def _runs_of_sentences(documents: IndexedDataset, limit: int, pairs: str, seed: int) -> np.ndarray:
    """(samples, 3): first sentence, last plus one, and the tokens wanted, in the seed's order.

    Every rank builds it in its own memory. Megatron's dataset does so on rank 0 and lets the others
    read a file, which they may do before it is there. Samples shorter than the limit by chance
    (``short_seq_prob``) are left out: with them passes would differ in their number of samples.
    """
    return build_mapping(
        documents.document_indices,
        documents.sequence_lengths,
        1,  # pass
        np.iinfo(np.int64).max,  # samples at most
        limit,
        0.0,  # share of samples that are shorter
        (seed >> 2) + 1,  # it takes positive 32-bit integers
        False,  # say nothing
        1 if pairs == "none" else 2,  # sentences at least
    )


def _trim(
    first: np.ndarray, second: np.ndarray, limit: int, rng: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Cut tokens off the longer segment until both fit, each from a random one of its ends."""
    keep_first = min(len(first), max(limit - len(second), (limit + 1) // 2))
    keep_second = min(len(second), limit - keep_first)
    return _cut(first, keep_first, rng), _cut(second, keep_second, rng)


def _cut(segment: np.ndarray, keep: int, rng: np.random.RandomState) -> np.ndarray:
    start = rng.binomial(len(segment) - keep, 0.5)
    return segment[start : start + keep]


def _fill(values: np.ndarray, length: int, padding: int) -> torch.Tensor:
    padded = np.full(length, padding, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
