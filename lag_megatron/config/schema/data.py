"""Text, tokenizer, objective."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lag_megatron.config.schema.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """``bpe`` and ``wordpiece`` are trained on the corpus; ``file`` reads a ``tokenizer.json``.

    Attributes:
        type: trained on the corpus (``bpe``, ``wordpiece``), or read from a ``file``.
        vocab_size: tokens of a tokenizer that is trained, without ``sentinels``; 257 or more.
        path: a ``tokenizer.json``, for the type ``file``.
        lowercase: for the type ``wordpiece``: fold case and drop accents.
        sentinels: tokens that stand for removed spans (UL2), added at the vocabulary's end with
            UL2's mode tokens; a file's own ones are counted; 0 or more.
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
        probability: share of a sample's tokens that are to be predicted; in (0, 1).
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
        causal: share of samples with plain next-token prediction; in [0, 1].
        prefix: share whose first part is seen in both directions and not predicted (S); in [0, 1].
        span: share in which spans are replaced by sentinels and predicted after the rest; each
            kind of ``span_denoisers`` is equally likely; in [0, 1].
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
    """One source of a mixture.

    Attributes:
        name: names the source in reports, and a folder: letters, digits, ``_``, ``-`` and ``.``.
        weight: share of the samples, relative to the other sources' weights; above 0.
        source: as ``data.source``.
        paths: as ``data.paths``.
        text_key: as ``data.text_key``.
    """

    __pydantic_config__ = FORBID
    name: str
    weight: float
    source: Literal["stdlib", "text", "jsonl", "parquet", "datasets", "prepared"] = "prepared"
    paths: tuple[str, ...] = ()
    text_key: str = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text comes from and how it is cut into samples.

    Attributes:
        source: ``stdlib`` is this Python's standard library, ``prepared`` a folder that
            ``tools/prepare_data.py`` wrote, ``datasets`` what Hugging Face's saved to disk.
        paths: files, globs or folders of the source.
        text_key: field of a record that holds the text, for ``jsonl``, ``parquet``, ``datasets``.
        mixture: several sources, drawn from by weight; the three keys above then belong to each.
        tokenizer: how text becomes tokens.
        objective: what is predicted: the next token, masked ones, or UL2's mixture.
        mlm: settings of the objective ``mlm``.
        ul2: settings of the objective ``ul2``.
        validation_fraction: share of the documents that is kept for validation; in (0, 1).
        validation_tokens: tokens of one validation; above 0.
        seed: of the order of the samples.
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
