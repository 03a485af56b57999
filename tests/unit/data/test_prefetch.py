"""Batches made ahead: what is asked for comes, and the next is on its way."""

import threading

import pytest

from lag_megatron.data.prefetch import Prefetcher


def test_the_next_is_begun_before_it_is_asked_for():
    begun, main = threading.Event(), threading.get_ident()

    def make(number):
        assert threading.get_ident() != main
        if number == 5:
            begun.set()
        return number * number

    batches = Prefetcher(make)
    assert batches.take(4) == 16
    assert begun.wait(10)
    assert [batches.take(number) for number in (5, 6, 2, 2, 3)] == [25, 36, 4, 4, 9]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_none_beyond_the_last_is_made(count):
    made = []
    assert list(Prefetcher(lambda number: made.append(number) or number).each(count)) == made
    assert made == list(range(count))


def test_an_error_comes_where_its_result_would():
    def make(number):
        if number == 1:
            raise ValueError("no batch 1")
        return number

    batches = Prefetcher(make)
    assert batches.take(0) == 0
    with pytest.raises(ValueError, match="no batch 1"):
        batches.take(1)
    assert batches.take(2) == 2
