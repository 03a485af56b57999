"""Choosing the tokens that a masked language model predicts, and their replacements."""

import numpy as np

# Devlin et al. 2019, section 3.1: 80 % [MASK], 10 % a random token, 10 % the token itself.
_MASKED = 0.8
_MASKED_OR_RANDOM = 0.9


def choose_positions(
    candidates: np.ndarray, word_starts: np.ndarray | None, count: int, rng: np.random.RandomState
) -> np.ndarray:
    """Draw the positions to predict.

    Args:
        candidates: (n,) positions that may be drawn, rising.
        word_starts: (n,) bool, whether a candidate begins a word: all of a word is drawn or none.
            None draws token by token.
        count: how many at most; words that would go beyond it are passed over.
        rng: the sample's randomness.

    Returns:
        At most ``count`` positions, rising.
    """
    if word_starts is None:
        return np.sort(rng.permutation(candidates)[:count])
    starts = np.flatnonzero(word_starts)
    sizes = np.diff(starts, append=len(candidates))
    chosen: list[np.ndarray] = []
    left = count
    for word in rng.permutation(len(starts)):
        if not left:
            break
        if sizes[word] <= left:
            chosen.append(candidates[starts[word] : starts[word] + sizes[word]])
            left -= sizes[word]
    return np.sort(np.concatenate([candidates[:0], *chosen]))


def replacements(
    labels: np.ndarray, *, mask: int, words: np.ndarray, rng: np.random.RandomState
) -> np.ndarray:
    """What the model sees in place of the tokens that it is to predict.

    Args:
        labels: (n,) the tokens.
        mask: id of [MASK].
        words: ids that a random token is drawn from.
        rng: the sample's randomness.
    """
    draw = rng.random_sample(len(labels))
    random_words = words[rng.randint(len(words), size=len(labels))]
    seen = np.where(draw < _MASKED_OR_RANDOM, random_words, labels)
    return np.where(draw < _MASKED, mask, seen)
