"""The data-parallel size: what world, tensor size and batch make of it, or do not."""

import pytest
from configuring import problems

from lag_megatron.config import ParallelConfig, data_parallel_size
from lag_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "world_size", "replicas"),
    [({}, 1, 1), ({}, 4, 4), ({"tensor": 2}, 4, 2), ({"world_size": 2, "tensor": 2}, 2, 1)],
)
def test_data_parallel_size(values, world_size, replicas):
    parallel = ParallelConfig(micro_batch=8, global_batch=32, **values)
    assert data_parallel_size(parallel, world_size=world_size) == replicas


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        (
            {"world_size": 4},
            2,
            "parallel.world_size: configured for 4 ranks, but 2 were started. "
            "Start 4 or change the key.",
        ),
        (
            {"tensor": 2},
            3,
            "parallel.tensor: 2 does not divide the world of 3 ranks. Start a multiple of 2 ranks.",
        ),
        (
            {"global_batch": 36},
            2,
            "parallel.global_batch: 36 sequences do not divide into micro_batch 8 x 2 "
            "data-parallel ranks = 16. Nearest: 32 or 48.",
        ),
        (
            {"global_batch": 4},
            1,
            "parallel.global_batch: 4 sequences do not divide into micro_batch 8 x 1 "
            "data-parallel ranks = 8. Nearest: 8 or 16.",
        ),
    ],
)
def test_data_parallel_size_that_does_not_come_out(values, world_size, message):
    with pytest.raises(ConfigError) as caught:
        data_parallel_size(ParallelConfig(micro_batch=8, **values), world_size=world_size)
    assert str(caught.value) == message


def test_a_configured_world_is_checked_with_the_rest():
    (line,) = problems("parallel.world_size=3")
    assert line.startswith(
        "parallel.global_batch: 32 sequences do not divide into micro_batch 8 x 3"
    )
    (line,) = problems("parallel={world_size: 3, tensor: 2}")
    assert line.startswith("parallel.tensor: 2 does not divide the world of 3 ranks.")
