"""UL2's mixture of denoisers for a decoder: causal, prefix and span corruption.

Tay et al. 2022 (arXiv 2205.05131), section 3.1: R is T5's span corruption, X the same with long
spans or many, S a prefix and what follows it. In a decoder-only model the targets come behind the
inputs, which see each other in both directions.
"""

from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from lag_megatron.config import Ul2Config
from lag_megatron.config.schema.span_corruption import (
    SpanLengths,
    is_extreme,
    sentinels_needed,
    span_lengths,
)
from lag_megatron.data.datasets.tokenizer import Tokenizer
from lag_megatron.errors import DataError


class Windows(Protocol):
    """Samples of next-token prediction: ``tokens`` and ``labels``, (s,) each."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one of them."""


class Ul2Samples:
    """Windows of text, each made a sample by a denoiser drawn from the seed and its index.

    Span corruption takes the first tokens of the window, as many as fit with their sentinels; the
    rest of it (twice the number of spans) is not seen in this pass.

    Args:
        windows: of the text.
        tokenizer: the one that made it.
        ul2: shares and kinds of denoisers.
        seq_length: tokens per sample.
        seed: of the denoisers.

    Raises:
        DataError: if the tokenizer lacks sentinels or mode tokens.
    """

    def __init__(
        self,
        windows: Windows,
        tokenizer: Tokenizer,
        ul2: Ul2Config,
        *,
        seq_length: int,
        seed: int,
    ) -> None:
        _require_tokens(tokenizer, ul2, seq_length)
        self._windows = windows
        self._ul2 = ul2
        self._seq_length = seq_length
        self._seed = seed
        self._end = tokenizer.eod
        self._padding = tokenizer.eod if tokenizer.padding is None else tokenizer.padding
        self._sentinels = np.asarray(tokenizer.sentinels, dtype=np.int64)
        self._modes = tokenizer.modes
        self._spans = _kinds(ul2, seq_length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample of s tokens.

        Returns:
            int64 ``tokens``, ``labels``, ``position_ids`` and float32 ``loss_mask``, (s,), and
            int64 ``prefix_length``, (): positions below it see each other, 0 is plain causal.
        """
        window = self._windows[index]
        # The streams of RandomState are frozen (NEP 19): a newer NumPy gives the same samples.
        rng = np.random.RandomState(xxhash.xxh32_intdigest(f"{self._seed} {index}".encode()))
        draw = rng.random_sample()
        if draw < self._ul2.causal:
            return {**window, "prefix_length": torch.tensor(0)}
        text = torch.cat([window["tokens"], window["labels"][-1:]]).numpy()
        if draw < self._ul2.causal + self._ul2.prefix or not self._spans:
            return self._prefix(text, rng)
        mode, lengths = self._spans[rng.randint(len(self._spans))]
        inputs, targets = corrupt(text[: lengths.window], lengths, self._sentinels, rng)
        return self._sample([*self._mode(mode), inputs], [targets, [self._end]])

    def _prefix(self, text: np.ndarray, rng: np.random.RandomState) -> dict[str, torch.Tensor]:
        mode = self._mode("[S]")
        text = text[: len(text) - len(mode)]
        split = rng.randint(1, len(text))
        return self._sample([*mode, text[:split]], [text[split:]])

    def _mode(self, name: str) -> list[list[int]]:
        return [[self._modes[name]]] if self._ul2.mode_tokens else []

    def _sample(self, inputs: list[Any], targets: list[Any]) -> dict[str, torch.Tensor]:
        """Inputs, targets, padding; each position predicts the next token if that is a target."""
        whole = np.full(self._seq_length + 1, self._padding, dtype=np.int64)
        prefix = sum(map(len, inputs))
        end = prefix + sum(map(len, targets))
        whole[:end] = np.concatenate([*inputs, *targets])
        positions = torch.arange(self._seq_length)
        predicts = (positions >= prefix - 1) & (positions < end - 1)
        return {
            "tokens": torch.from_numpy(whole[:-1]),
            "labels": torch.from_numpy(whole[1:]),
            "loss_mask": predicts.float(),
            "position_ids": positions,
            "prefix_length": torch.tensor(prefix),
        }


def corrupt(
    text: np.ndarray, lengths: SpanLengths, sentinels: np.ndarray, rng: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Take random spans out of a text (T5's, Raffel et al. 2020, section 3.1.4).

    Text that stays and spans take turns, the former first; every way of cutting either into its
    number of pieces, of one token at least, is as likely as any other.

    Args:
        text: (window,) int64.
        lengths: of the parts.
        sentinels: ids of the sentinels; the first stands for the first span, and so on.
        rng: the sample's randomness.

    Returns:
        The text with a sentinel in place of each span, and the spans, each behind its sentinel.
    """
    assert len(text) == lengths.window
    kept = _cut_randomly(lengths.window - lengths.removed, lengths.spans, rng)
    removed = _cut_randomly(lengths.removed, lengths.spans, rng)
    turns = np.stack([kept, removed], axis=1).ravel()
    is_removed = np.repeat(np.tile([False, True], lengths.spans), turns)
    used = sentinels[: lengths.spans]
    inputs = np.insert(text[~is_removed], np.cumsum(kept), used)
    targets = np.insert(text[is_removed], np.cumsum(removed) - removed, used)
    return inputs, targets


def _cut_randomly(total: int, pieces: int, rng: np.random.RandomState) -> np.ndarray:
    """Lengths of so many pieces, each 1 at least, of ``total`` things in a row."""
    cuts = np.sort(rng.choice(total - 1, pieces - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _kinds(ul2: Ul2Config, seq_length: int) -> list[tuple[str, SpanLengths]]:
    """Mode token and lengths of each kind of span corruption."""
    kinds = []
    for mean, share in ul2.span_denoisers if ul2.span > 0 else ():
        lengths = span_lengths(seq_length, mean, share, mode_token=ul2.mode_tokens)
        assert lengths is not None, "the configuration's check refuses such short samples"
        kinds.append(("[X]" if is_extreme(mean, share) else "[R]", lengths))
    return kinds


def _require_tokens(tokenizer: Tokenizer, ul2: Ul2Config, seq_length: int) -> None:
    """Refuse a tokenizer without what the denoisers need."""
    needed = sentinels_needed(ul2, seq_length)
    missing = [] if not ul2.mode_tokens or ul2.causal == 1 else ["[R]", "[S]", "[X]"]
    missing = [name for name in missing if name not in tokenizer.modes]
    if len(tokenizer.sentinels) < needed or missing:
        lacks = f", and lacks {', '.join(missing)}" if missing else ""
        raise DataError(
            f"data.tokenizer.sentinels: the objective ul2 needs {needed} sentinels <extra_id_0>... "
            f"at model.seq_length {seq_length}, but the tokenizer has {len(tokenizer.sentinels)}"
            f"{lacks}. Set data.tokenizer.sentinels to {max(needed, 1)} or more and prepare the "
            "text again."
        )
