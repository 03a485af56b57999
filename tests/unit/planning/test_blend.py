"""The order of a mixture's sources."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.planning.blend import Blend


def furthest_off(blend: Blend, samples: int) -> float:
    """The largest distance of a source's samples from its share, over all prefixes."""
    shares, drawn, furthest = np.asarray(blend.shares), np.zeros(len(blend.shares)), 0.0
    for sample in range(samples):
        source, number = blend.place(sample)
        assert number == drawn[source]
        drawn[source] += 1
        furthest = max(furthest, float(np.abs(drawn - (sample + 1) * shares).max()))
    assert blend.drawn(samples) == drawn.tolist()
    return furthest


@pytest.mark.parametrize("weights", [(57, 17, 17, 9), (0.57, 0.17, 0.17, 0.09)])
def test_shares_are_within_one_sample_at_any_prefix(weights: tuple[float, ...]) -> None:
    blend = Blend(weights)
    assert blend.counts.tolist() == [57, 17, 17, 9]
    assert furthest_off(blend, 1000) < 1


@given(st.lists(st.integers(1, 60) | st.floats(1e-3, 9), min_size=1, max_size=9), st.data())
def test_any_weights(weights: list[float], data: st.DataObject) -> None:
    blend = Blend(weights)
    assert blend.shares == pytest.approx(np.asarray(weights) / sum(weights), abs=2e-5)
    assert furthest_off(blend, data.draw(st.integers(0, 300))) < 1
    period = int(blend.counts.sum())
    for sample in (0, 1, period - 1):
        source, number = blend.place(sample)
        assert blend.place(sample + 3 * period) == (source, number + 3 * blend.counts[source])


def test_no_source_is_rounded_away() -> None:
    assert Blend([1e-9, 1.0]).counts.min() == 1
    assert Blend([3]).place(12345) == (0, 12345)


def test_the_longest_prefix_that_sources_can_fill() -> None:
    blend = Blend([2, 1])
    lengths = [blend.longest([n, 100], at_most=1000) for n in range(6)]
    for limit, length in enumerate(lengths):
        assert blend.drawn(length)[0] <= limit < blend.drawn(length + 1)[0]
    assert all(low <= high for low, high in pairwise(lengths))
    assert blend.longest([50, 50], at_most=7) == 7
