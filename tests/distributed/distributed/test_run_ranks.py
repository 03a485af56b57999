"""The helper that forks ranks: results, errors, deaths and hangs."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import run_ranks

from lag_megatron.errors import RunError


def ranks_sum():
    import torch
    import torch.distributed as dist

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.reductions import sum_over_data_parallel

    world = start_world(tensor=1)
    mine = torch.tensor([world.rank + 1.0], dtype=torch.float64)
    total = float(sum_over_data_parallel(mine, world))
    assert dist.get_world_size() == world.size
    stop_world()
    return world.rank, total


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_by_rank(size):
    expected = [(rank, size * (size + 1) / 2) for rank in range(size)]
    assert run_ranks(ranks_sum, size) == expected


def one_fails():
    if os.environ["RANK"] == "1":
        raise RunError("disk full")
    time.sleep(60)


def test_an_error_comes_with_its_rank_and_traceback():
    with pytest.raises(RunError, match="disk full") as caught:
        run_ranks(one_fails, 2)
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert "in one_fails" in caught.value.__notes__[0]


def one_dies():
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_death_is_an_error():
    with pytest.raises(ChildProcessError, match="rank 0 ended with -9"):
        run_ranks(one_dies, 2)


def hang_here():
    time.sleep(60)


def test_a_hang_shows_all_stacks_and_leaves_nothing_behind():
    with pytest.raises(TimeoutError) as caught:
        run_ranks(hang_here, 2, timeout=0.5)
    assert str(caught.value).count("in hang_here") == 2


def not_picklable():
    return lambda: None


def test_a_result_has_to_be_picklable():
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        run_ranks(not_picklable, 1)


def train_once(config):
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=1)
    engine = Engine(config, world, num_layers=1, vocab_size=64)
    from conftest import random_batches

    result = engine.train_step(random_batches(config, world, 0), step=0, lr=1e-3)
    stop_world()
    return result.loss


def test_an_engine_leaves_no_shared_memory():
    from conftest import pico_config

    before = set(Path("/dev/shm").glob("deepspeed_*"))
    losses = run_ranks(train_once, 2, pico_config(num_layers=1))
    assert losses[0] == losses[1]
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
