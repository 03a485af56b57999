"""Text, tokenizer, objective."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lag_megatron.config.schema.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """``bpe`` and ``wordpiece`` are trained on the corpus; ``file`` reads a ``tokenizer.json``.

    Attributes:
        vocab_size: of a tokenizer that is trained, without the tokens of ``sentinels``.
        path: of the type ``file``.
        lowercase: of the type ``wordpiece``: fold case and drop accents.
        sentinels: tokens that stand for spans taken out (UL2), added at the vocabulary's end with
            UL2's mode tokens; a file's own ones are counted.
    """

    __pydantic_config__ = FORBID
    type: Literal["bpe", "wordpiece", "file"] = "bpe"
    vocab_size: int = 4096
    path: str | None = None
    lowercase: bool = True
    sentinels: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MlmConfig:
    """Masked language modelling (Devlin et al. 2019): 80 % [MASK], 10 % random, 10 % unchanged.

    Attributes:
        probability: share of a sample's tokens that are to be predicted.
        whole_word: mask all pieces of a word or none.
        sentence_pairs: what ``model.sentence_head`` predicts: ``order`` (ALBERT's: were the
            segments swapped) or ``next`` (BERT's: does the second follow the first).
    """

    __pydantic_config__ = FORBID
    probability: float = 0.15
    whole_word: bool = False
    sentence_pairs: Literal["none", "order", "next"] = "none"

    def predictions(self, seq_length: int) -> int:
        """The most tokens predicted in a sample, and so the length of a batch's ``labels``."""
        return math.ceil(self.probability * seq_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ul2Config:
    """Shares of UL2's denoisers (Tay et al. 2022) for a decoder.

    Attributes:
        causal: share of samples with plain next-token prediction.
        prefix: share whose first part is seen in both directions and not predicted (S).
        span: share in which spans are replaced by sentinels and predicted after the rest; each
            kind of ``span_denoisers`` is as likely as the others.
        span_denoisers: (mean length, share of tokens taken out) of each kind; those with a mean
            length of 12 or more or a share of 0.3 or more are extreme (X), others regular (R).
        mode_tokens: begin each denoiser's samples with its mode token.
    """

    __pydantic_config__ = FORBID
    causal: float = 0.6
    prefix: float = 0.2
    span: float = 0.2
    span_denoisers: tuple[tuple[float, float], ...] = (
        (3.0, 0.15),
        (8.0, 0.15),
        (3.0, 0.5),
        (8.0, 0.5),
        (64.0, 0.15),
        (64.0, 0.5),
    )
    mode_tokens: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture; ``weight`` is relative to the others'."""

    __pydantic_config__ = FORBID
    name: str
    weight: float
    source: Literal["stdlib", "text", "jsonl", "parquet", "datasets", "prepared"] = "prepared"
    paths: tuple[str, ...] = ()
    text_key: str = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from and how it is cut into samples.

    With ``mixture`` samples are drawn from several sources by weight; ``source``, ``paths`` and
    ``text_key`` then belong to its parts.  A source ``prepared`` is a folder that
    ``tools/prepare_data.py`` wrote.
    """

    __pydantic_config__ = FORBID
    source: Literal["stdlib", "text", "jsonl", "parquet", "datasets", "prepared"] = "stdlib"
    paths: tuple[str, ...] = ()
    text_key: str = "text"
    mixture: tuple[SourceConfig, ...] = ()
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    objective: Literal["causal", "mlm", "ul2"] = "causal"
    mlm: MlmConfig = field(default_factory=MlmConfig)
    ul2: Ul2Config = field(default_factory=Ul2Config)
    validation_fraction: float = 0.01
    validation_tokens: int = 65536
    seed: int = 1234
