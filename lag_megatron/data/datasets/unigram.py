"""The loss of a unigram model: token frequencies and nothing else."""

from collections.abc import Sequence

import numpy as np


def cross_entropy(unigrams: np.ndarray) -> float:
    """Nats per validation token under the training tokens' frequencies.

    Args:
        unigrams: counts in (training, validation), (2, vocabulary); training's get one more each.
    """
    return mixed_cross_entropy([unigrams], [1.0])


def mixed_cross_entropy(unigrams: Sequence[np.ndarray], weights: Sequence[float]) -> float:
    """:func:`cross_entropy` of a mixture, both of whose splits are drawn by weight."""
    model = np.zeros(unigrams[0].shape[1])
    truth = np.zeros_like(model)
    for (train, validation), weight in zip(unigrams, weights, strict=True):
        model += weight * (train + 1.0) / (train + 1.0).sum()
        truth += weight * validation / validation.sum()
    total = float(sum(weights))
    return float(-(truth / total) @ np.log(model / total))
