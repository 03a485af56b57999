"""The parts of a batch's loss, each a sum over labels, and how many labels each has."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def loss_sums(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Sum over its labels of each part of the loss, in nats, shape (parts,), fp32.

    The first part is the cross-entropy of tokens; models with a sentence head have a second.
    """
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
    )
    return (losses.float() * batch["loss_mask"]).sum()[None]


def labels_of(batches: Sequence[Batch]) -> list[float]:
    """How many labels each part of the loss has in these batches together."""
    return [sum(float(batch["loss_mask"].sum()) for batch in batches)]


def mean_loss(sums: Sequence[float], labels: Sequence[float]) -> float:
    """The loss in nats: each part's mean over its labels, added up."""
    return math.fsum(part / max(count, 1.0) for part, count in zip(sums, labels, strict=True))
