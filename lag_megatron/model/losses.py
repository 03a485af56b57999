"""The parts of a batch's loss, each a sum over labels, and how many labels each has."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lag_megatron.model.attention import prefix_mask

MicroBatch = dict[str, Tensor]


def loss_sums(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Sum over its labels of each part of the loss, in nats, shape (parts,), fp32.

    The first part is the cross-entropy of tokens; models with a sentence head have a second.  A
    batch whose rows are all whole need not have ``padding_mask``; ``prefix_length`` is of its last
    rows, and the others have none.
    """
    return _masked(model, batch) if "masked_positions" in batch else _causal(model, batch)


def _causal(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    names = ("tokens", "position_ids", "labels", "loss_mask")
    tokens, position_ids, labels, loss_mask = (batch[name] for name in names)
    mask = None
    if "prefix_length" in batch:
        mask = prefix_mask(batch["prefix_length"], tokens.shape[1])
    loss: Tensor = model(tokens, position_ids, mask, labels=labels, loss_mask=loss_mask)
    return loss[None]


def _masked(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    loss, sentence = model(
        batch["tokens"],
        batch["position_ids"],
        batch["token_types"],
        batch.get("padding_mask"),
        batch["masked_positions"],
        batch["labels"],
        batch["loss_mask"],
    )
    parts = [loss]
    if sentence is not None:
        parts.append(F.cross_entropy(sentence.float(), batch["sentence_labels"], reduction="sum"))
    return torch.stack(parts)


def labels_of(batches: Sequence[MicroBatch]) -> list[float]:
    """How many labels each part of the loss has in these batches together."""
    counts = [sum(float(batch["loss_mask"].sum()) for batch in batches)]
    if all("sentence_labels" in batch for batch in batches):
        counts.append(float(sum(len(batch["sentence_labels"]) for batch in batches)))
    return counts


def mean_loss(sums: Sequence[float], labels: Sequence[float]) -> float:
    """The loss in nats: each part's mean over its labels, added up."""
    return math.fsum(part / max(count, 1.0) for part, count in zip(sums, labels, strict=True))
