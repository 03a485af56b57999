"""No rank waits for ever for another, whichever group it waits in."""

import datetime
import os
import signal
import socket
import threading
import time

import pytest
from conftest import run_ranks

from lag_megatron.errors import RunError

LIMIT = 3.0


def _start(limit=LIMIT):
    from lag_megatron.distributed import world as world_module

    world_module.COLLECTIVE_TIMEOUT_MARGIN = datetime.timedelta()
    return world_module.start_world(tensor=1, timeout=limit)


def _waited_in(kind):
    """How long rank 0 waits in a group to which rank 1 does not come, though it lives."""
    import deepspeed.comm
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    world = _start()
    deepspeed.init_distributed()
    group = {
        "default": dist.group.WORLD,
        "megatron": parallel_state.get_data_parallel_group(),
        "deepspeed": deepspeed.comm.new_group([0, 1]),
    }[kind]
    if world.rank == 1:
        time.sleep(LIMIT + 5)
        return None
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 3000ms"):
        dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - began


@pytest.mark.parametrize("kind", ["default", "megatron", "deepspeed"])
def test_a_collective_waits_no_longer_than_the_configuration_says(kind):
    """Where torch no longer honours its own default, DeepSpeed's groups wait 30 minutes."""
    waited, _ = run_ranks(_waited_in, 2, kind)
    assert LIMIT - 1 < waited < LIMIT + 5


def _nccl_default():
    import torch.distributed.distributed_c10d as c10d

    from lag_megatron.distributed.world import COLLECTIVE_TIMEOUT_MARGIN, start_world

    start_world(tensor=1, timeout=77)
    return c10d._get_default_timeout("nccl") - COLLECTIVE_TIMEOUT_MARGIN


def test_groups_over_nccl_have_the_same_default():
    assert run_ranks(_nccl_default, 1) == [datetime.timedelta(seconds=77)]


def _frozen_while_others_wait(seconds):
    world = _start()
    if world.rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        time.sleep(seconds)
    world.barrier()


def test_a_frozen_rank_ends_those_that_wait_for_its_messages(capfd):
    """The group for messages waits a day: the heartbeat must end it."""
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="rank 0 ended with 1"):
        run_ranks(_frozen_while_others_wait, 2, 60)
    assert time.monotonic() - began < 40
    assert "has been silent for" in capfd.readouterr().err


def _busy(seconds):
    world = _start(limit=1)
    return world.run_on_rank0(lambda: time.sleep(seconds) or "done")


def test_ranks_wait_as_long_as_the_coordinator_works():
    assert run_ranks(_busy, 2, 3) == ["done", "done"]


def test_a_port_that_another_run_has_is_named(monkeypatch):
    from lag_megatron.distributed.rendezvous import open_store

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RunError, match="no other run has this port"):
            open_store(0, 2, 0)


def test_ranks_that_do_not_come_are_missed(monkeypatch):
    from lag_megatron.distributed import rendezvous

    monkeypatch.setattr(rendezvous, "_TIMEOUT", datetime.timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(RunError, match=r"the 2 ranks did not meet at 127\.0\.0\.1"):
        rendezvous.open_store(0, 2, 0)
