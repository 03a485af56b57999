"""Of a step the host reads from the device once, when all of it is on its way."""

import dataclasses
import traceback
from pathlib import Path

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_alone, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose results the host needs, so that it waits for a device.
WAITING = ("_local_scalar_dense", "nonzero", "equal")
# What these read, they read on a CPU alone: kernels there take numbers, and rows are counted.
ON_A_CPU = {"adamw", "adamw_cpu", "linear_cross_entropy", "softmax", "softmax_cpu"}
LAST = 3  # the step that is looked at: DeepSpeed's timers would begin with the one before


class Reads(TorchDispatchMode):
    """Notes which file of the package asks for the value of a tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING:
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            ours = [file.stem for file in files if "lag_megatron" in file.parts]
            self.seen.append(ours[-1])
        return func(*args, **(kwargs or {}))


def engine_and_batches(config):
    from lag_megatron.distributed.world import start_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=2, vocab_size=PICO_VOCABULARY)
    return engine, [random_batches(config, world, step) for step in range(LAST + 1)]


def reads_on_a_cpu(config):
    from deepspeed.accelerator import get_accelerator

    from lag_megatron.distributed.world import stop_world
    from lag_megatron.engine import engine as engine_module

    engine, batches = engine_and_batches(config)
    for step in range(LAST):
        engine.train_step(batches[step], step=step, lr=1e-3)
    counted = engine_module.labels_of(batches[LAST])
    transfers, to_host = [], engine_module.to_host
    engine_module.labels_of = lambda given: counted  # they are counted in the host's memory
    engine_module.to_host = lambda *given: (transfers.append(len(given)), to_host(*given))[1]
    waits, accelerator = [], get_accelerator()
    accelerator.synchronize = lambda *given: waits.append(given)
    with Reads() as mode:
        engine.train_step(batches[LAST], step=LAST, lr=1e-3)
    evaluated = Reads()
    with evaluated:
        engine.evaluate(batches[1:2])
    stop_world()
    return mode.seen, transfers, evaluated.seen, waits


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_values_are_read_once(stage):
    config = pico_config(zero_stage=stage)
    for seen, transfers, evaluated, waits in run_ranks(reads_on_a_cpu, 2, config):
        assert set(seen) <= ON_A_CPU
        assert transfers == [3]  # sums, labels, norm
        assert set(evaluated) <= ON_A_CPU
        assert waits == []


def waits_on_a_gpu(config):
    """A step in which torch refuses every call that waits, but for the one at its end."""
    from lag_megatron.distributed.world import stop_world
    from lag_megatron.engine import engine as engine_module

    engine, batches = engine_and_batches(config)
    pinned = [[{n: t.pin_memory() for n, t in part.items()} for part in b] for b in batches]
    for step in range(LAST):
        engine.train_step(pinned[step], step=step, lr=1e-3)
    to_host = engine_module.to_host

    def read_at_the_end(*given):
        torch.cuda.set_sync_debug_mode("default")
        return to_host(*given)

    engine_module.to_host = read_at_the_end
    torch.cuda.set_sync_debug_mode("error")
    loss = engine.train_step(pinned[LAST], step=LAST, lr=1e-3).loss
    stop_world()
    return loss


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16")])
def test_a_step_on_a_gpu_waits_for_nothing(stage, precision):
    config = pico_config(zero_stage=stage, precision=precision)
    alone = dataclasses.replace(config.parallel, world_size=1)
    loss = run_alone(waits_on_a_gpu, dataclasses.replace(config, parallel=alone))
    assert 0 < loss < 10
