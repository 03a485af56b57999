"""Checks of an objective's settings, and of the tokenizer and model that it needs."""

import math
from collections.abc import Iterator

from lag_megatron.config.schema.data import DataConfig, MlmConfig, Ul2Config
from lag_megatron.config.schema.run import RunConfig
from lag_megatron.config.schema.span_corruption import sentinels_needed, span_lengths

_SPECIAL = 3  # [CLS] and two [SEP]


def objective_problems(config: RunConfig) -> Iterator[str]:
    """Contradictions in the settings of ``data.objective``, one line each."""
    data = config.data
    for name, given, plain in (("mlm", data.mlm, MlmConfig()), ("ul2", data.ul2, Ul2Config())):
        if data.objective != name and given != plain:
            yield (
                f"data.{name}: is for the objective {name!r} (got {data.objective!r}). Remove it, "
                f"or set data.objective: {name}."
            )
    if data.objective == "mlm":
        yield from _mlm(config)
    if data.objective == "ul2":
        found = list(_ul2(data.ul2, config.model.seq_length))
        # With impossible spans the number of sentinels is undefined.
        yield from found or _sentinels(config)


def _mlm(config: RunConfig) -> Iterator[str]:
    mlm, length = config.data.mlm, config.model.seq_length
    if not 0 < mlm.probability < 1:
        yield f"data.mlm.probability: must be in (0, 1) (got {mlm.probability})."
    if 0 < length < _SPECIAL + 2:
        yield (
            f"model.seq_length: the objective mlm needs room for [CLS], two [SEP] and two tokens, "
            f"so at least {_SPECIAL + 2} (got {length})."
        )
    if config.data.tokenizer.type == "bpe" and not _made_before(config.data):
        yield (
            "data.tokenizer.type: the objective mlm needs [CLS], [SEP] and [MASK], which a trained "
            "'bpe' does not have. Take 'wordpiece', or a 'file' that has them."
        )
    if config.model.sentence_head and mlm.sentence_pairs == "none":
        yield (
            "data.mlm.sentence_pairs: model.sentence_head has nothing to classify with 'none'. "
            "Take 'order' or 'next', or model.sentence_head: false."
        )
    if mlm.sentence_pairs != "none" and not config.model.sentence_head:
        yield (
            f"model.sentence_head: data.mlm.sentence_pairs {mlm.sentence_pairs!r} is for the head "
            "that classifies pairs. Set it to true, or sentence_pairs: none."
        )


def _ul2(ul2: Ul2Config, seq_length: int) -> Iterator[str]:
    shares = {"causal": ul2.causal, "prefix": ul2.prefix, "span": ul2.span}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            yield f"data.ul2.{name}: a share must be in [0, 1] (got {share})."
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        yield (
            "data.ul2: the shares causal, prefix and span must add up to 1 "
            f"(got {' + '.join(str(share) for share in shares.values())} = "
            f"{sum(shares.values()):g})."
        )
    if ul2.prefix > 0 and 0 < seq_length < 3:
        yield f"model.seq_length: a prefix and its mode token need 3 or more (got {seq_length})."
    if ul2.span > 0:
        yield from _denoisers(ul2, seq_length)


def _denoisers(ul2: Ul2Config, seq_length: int) -> Iterator[str]:
    if not ul2.span_denoisers:
        yield "data.ul2.span_denoisers: at least one is needed where span is above 0."
    for number, (mean, share) in enumerate(ul2.span_denoisers):
        where = f"data.ul2.span_denoisers.{number}"
        if not 1 <= mean < math.inf:
            yield f"{where}: the mean length of a span must be 1 or more (got {mean})."
        elif not 0 < share < 1:
            yield f"{where}: the share of tokens taken out must be in (0, 1) (got {share})."
        elif seq_length > 0 and not span_lengths(
            seq_length, mean, share, mode_token=ul2.mode_tokens
        ):
            yield (
                f"model.seq_length: {seq_length} has no room for a span, its sentinels and the "
                "end. Make it 5 at least."
            )


def _sentinels(config: RunConfig) -> Iterator[str]:
    needed = sentinels_needed(config.data.ul2, config.model.seq_length)
    have = config.data.tokenizer.sentinels
    if have < needed and not _made_before(config.data):
        yield (
            f"data.tokenizer.sentinels: the objective ul2 needs {needed} at model.seq_length "
            f"{config.model.seq_length} (the most spans of a sample; mode tokens come with the "
            f"first), but got {have}. Set it to {needed} or more."
        )


def _made_before(data: DataConfig) -> bool:
    """Whether the tokenizer comes with prepared text, so that it cannot be checked here.

    One source of a mixture that is prepared brings the tokenizer of all.
    """
    kinds = [source.source for source in data.mixture] or [data.source]
    return any(kind == "prepared" for kind in kinds)
