"""The first samples of a run as readable text, and statistics over many of them."""

from collections import Counter
from collections.abc import Iterator

import torch

from lag_megatron.config import RunConfig
from lag_megatron.data.batch import Batch
from lag_megatron.data.datasets.blended_dataset import Prepared
from lag_megatron.data.datasets.tokenizer import Tokenizer
from lag_megatron.data.global_batches import TrainingData

_MEASURED_SAMPLES = 2000


def describe_samples(prepared: Prepared, config: RunConfig, *, count: int) -> str:
    """Return the first samples of a run, readable, and what many of them are made of.

    A prefix stands in ``[[ ]]``, what is predicted in ``{ }``; a masked token is
    ``{input -> label}``. Padding is left out and counted.

    Args:
        prepared: tokens and tokenizer.
        config: of the run, with its objective.
        count: samples to show.

    Raises:
        DataError: if the text is too short for one batch, or the tokenizer does not suit.
    """
    tokenizer = prepared.tokenizer()
    training = TrainingData(
        prepared,
        seq_length=config.model.seq_length,
        global_batch=config.parallel.global_batch,
        seed=config.data.seed,
        data=config.data,
    )
    shown = []
    measured: Counter[str] = Counter()
    for number, sample in enumerate(_samples(training, config, max(count, _MEASURED_SAMPLES))):
        kind = _kind(sample, tokenizer)
        if number < count:
            shown.append(f"--- sample {number}: {kind}\n{_text(sample, tokenizer)}\n")
        measured.update(_counts(sample, kind, tokenizer))
    return "\n".join([*shown, *_shares(measured)])


def _samples(training: TrainingData, config: RunConfig, count: int) -> Iterator[Batch]:
    """Samples of the run one by one; a single pass of a small text is enough."""
    batch = config.parallel.global_batch
    for number in range(min(count, training.samples_per_epoch)):
        step, row = divmod(number, batch)
        whole = training.batch(step, [row])
        yield {key: value[0] for key, value in whole.items()}


def _kind(sample: Batch, tokenizer: Tokenizer) -> str:
    if "masked_positions" in sample:
        return "mlm"
    prefix = int(sample.get("prefix_length", 0))
    if not prefix:
        return "causal"
    names = {number: name for name, number in tokenizer.modes.items()}
    mode = names.get(int(sample["tokens"][0]), "")
    has_sentinels = bool(torch.isin(sample["tokens"], torch.tensor(tokenizer.sentinels)).any())
    return " ".join(["span" if has_sentinels else "prefix", mode]).strip()


def _text(sample: Batch, tokenizer: Tokenizer) -> str:
    return _masked(sample, tokenizer) if "masked_positions" in sample else _open(sample, tokenizer)


def _open(sample: Batch, tokenizer: Tokenizer) -> str:
    """A sample that predicts the next token, with its prefix and targets marked."""
    labels, predicted = sample["labels"], sample["loss_mask"] > 0
    targets = tokenizer.decode(labels[predicted].tolist())
    prefix = int(sample.get("prefix_length", 0))
    inputs = tokenizer.decode(sample["tokens"][: prefix or 1].tolist())
    padding = len(labels) - max(prefix - 1, 0) - int(predicted.sum())
    text = f"[[{inputs}]]{{{targets}}}" if prefix else f"{inputs}{{{targets}}}"
    return text + (f" + {padding} of padding" if padding else "")


def _masked(sample: Batch, tokenizer: Tokenizer) -> str:
    """A sample of segments, with what is predicted in place."""
    length = int(sample["padding_mask"].sum())
    words = [tokenizer.decode([number]) for number in sample["tokens"][:length].tolist()]
    predicted = sample["loss_mask"] > 0
    places = zip(
        sample["masked_positions"][predicted].tolist(),
        sample["labels"][predicted].tolist(),
        strict=True,
    )
    for position, label in places:
        words[position] = f"{{{words[position]} -> {tokenizer.decode([label])}}}"
    text = " ".join(words)
    if "sentence_labels" in sample:
        text += f"\nsentence label: {int(sample['sentence_labels'])}"
    padding = len(sample["tokens"]) - length
    return text + (f" + {padding} of padding" if padding else "")


def _counts(sample: Batch, kind: str, tokenizer: Tokenizer) -> dict[str, int]:
    """What :func:`_shares` adds up over samples."""
    counts = {"samples": 1, f"kind {kind}": 1, "places": len(sample["tokens"])}
    predicted = sample["loss_mask"] > 0
    counts["predicted"] = int(predicted.sum())
    if kind != "mlm":
        return counts
    seen = sample["tokens"][sample["masked_positions"][predicted]]
    labels = sample["labels"][predicted]
    same = int(torch.eq(seen, labels).sum())
    masked = seen.tolist().count(tokenizer.mask)
    return counts | {
        "tokens": int(sample["padding_mask"].sum()),
        "masked": masked,
        "unchanged": same,
        "replaced": counts["predicted"] - masked - same,
        "second": int(sample.get("sentence_labels", 0)),
    }


def _shares(counts: Counter[str]) -> Iterator[str]:
    """Shares over all samples measured, one line each."""
    samples = counts["samples"]
    yield f"--- measured over {samples} samples"
    for name in sorted(name for name in counts if name.startswith("kind ")):
        yield f"{name.removeprefix('kind ')}: {counts[name] / samples:.1%} of samples"
    yield f"predicted: {counts['predicted'] / counts['places']:.1%} of places"
    if not counts["kind mlm"]:
        return
    yield f"padding: {1 - counts['tokens'] / counts['places']:.1%} of places"
    yield f"predicted: {counts['predicted'] / counts['tokens']:.1%} of tokens"
    for name in ("masked", "replaced", "unchanged"):
        yield f"{name}: {counts[name] / max(counts['predicted'], 1):.1%} of the predicted"
    yield f"second segment not the next: {counts['second'] / samples:.1%} of samples"
