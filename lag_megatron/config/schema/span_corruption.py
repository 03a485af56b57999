"""Lengths of the parts of a span-corrupted sample (T5's arithmetic, for a decoder)."""

from dataclasses import dataclass

from lag_megatron.config.schema.data import Ul2Config

# Tokens that begin the samples of regular, sequential (prefix) and extreme denoisers.
MODES = ("[R]", "[S]", "[X]")
# Tay et al. 2022, section 3.1: long spans or many of them make a denoiser extreme.
_EXTREME_LENGTH = 12
_EXTREME_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class SpanLengths:
    """Numbers of tokens of one kind of span corruption, the same for each of its samples.

    Attributes:
        window: tokens of text that the sample is made of.
        removed: those of them that are taken out and predicted.
        spans: pieces that they are taken out in, each replaced by one sentinel.
    """

    window: int
    removed: int
    spans: int

    @property
    def inputs(self) -> int:
        """What is left of the text, with one sentinel a span."""
        return self.window - self.removed + self.spans

    @property
    def targets(self) -> int:
        """Every span behind its sentinel, and the end."""
        return self.removed + self.spans + 1


def span_lengths(
    seq_length: int, mean_length: float, share: float, *, mode_token: bool
) -> SpanLengths | None:
    """The longest window whose inputs and targets fit, or None where not even two tokens do.

    Raffel et al. 2020, section 3.1.4: a share of the window is removed, in as many spans as the
    mean length says, one at least; each span follows a token that stays.

    Args:
        seq_length: of the sample; with the last label it holds one token more.
        mean_length: tokens of a span, on average.
        share: share of the window's tokens to remove, above 0 and below 1.
        mode_token: whether a mode token comes first.
    """
    available = seq_length + 1 - mode_token
    for window in range(available, 1, -1):
        removed = min(max(round(window * share), 1), window - 1)
        spans = min(max(round(removed / mean_length), 1), window - removed)
        lengths = SpanLengths(window, removed, spans)
        if lengths.inputs + lengths.targets <= available:
            return lengths
    return None


def is_extreme(mean_length: float, share: float) -> bool:
    """Whether UL2 calls this denoiser extreme (X) and not regular (R)."""
    return mean_length >= _EXTREME_LENGTH or share >= _EXTREME_SHARE


def sentinels_needed(ul2: Ul2Config, seq_length: int) -> int:
    """Sentinels that the sample with the most spans needs; mode tokens come with the first."""
    kinds = [
        span_lengths(seq_length, mean, share, mode_token=ul2.mode_tokens)
        for mean, share in ul2.span_denoisers
        if ul2.span > 0
    ]
    with_modes = ul2.mode_tokens and ul2.prefix > 0
    return max([int(with_modes), *(kind.spans for kind in kinds if kind)])
