"""What growing a checkpoint offline will take, told before it begins."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.optimizer_states import role_of, state_shape, states_of
from lag_megatron.checkpoint.state.spec import DTYPES
from lag_megatron.checkpoint.state.tensor_parallel import cut_dim
from lag_megatron.checkpoint.writer.file_writer import BUFFER_BYTES, PIECE_BYTES
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.growth_map import Copy
from lag_megatron.growth.weight_init import Diagonals, Normal

_BYTES = 4
_TRIAL_BYTES = 1 << 26
# What drawing takes beside the buffer: a few arrays of doubles for 2**18 elements.
_DRAWING_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class GrowthEstimate:
    """Bytes and seconds.

    Attributes:
        read: bytes of the source that are needed, each counted once.
        write: bytes of tensors of the target.
        memory: anonymous memory of all workers above that of the idle program, in bytes.
        seconds: at the rate at which this disk took a trial file; None if it took none.
    """

    read: int
    write: int
    memory: int
    seconds: float | None


def estimate_growth(
    growth: GrownState, *, workers: int, folder: Path | None = None
) -> GrowthEstimate:
    """What this growth will take.

    Args:
        growth: what is to be done.
        workers: threads that write.
        folder: where the target will be; a trial file without a name is written on its disk.
    """
    shapes = {**growth.source.layout.shapes, **growth.source.frozen.shapes}
    optimizer = growth.layout.optimizer
    width = DTYPES[growth.source.topology.precision].itemsize
    used = {
        (state, origin.parameter)
        for name, blocks in growth.growth_map.blocks.items()
        for block in blocks
        for state in states_of(optimizer, growth.layout.shapes.get(name))
        if isinstance(origin := block.sources[role_of(state)], Copy)
        and (state == "fp32" or name not in growth.frozen.shapes)
    }
    tensor_size = growth.source.topology.tensor_size
    read = sum(
        numel(state_shape(state, shapes[name]))
        * (width if name in growth.source.frozen.shapes else _BYTES)
        * (1 if cut_dim(name) is None else tensor_size)
        for state, name in used
    )
    draws = any(
        isinstance(origin, Normal) or (isinstance(origin, Diagonals) and origin.rest)
        for blocks in growth.growth_map.blocks.values()
        for block in blocks
        for origin in block.sources.values()
    )
    memory = workers * (BUFFER_BYTES + (_DRAWING_BYTES if draws else 0))
    write = growth.bytes_to_write
    rate = None if folder is None else _write_rate(folder)
    return GrowthEstimate(read, write, memory, write / rate if rate else None)


def _write_rate(folder: Path) -> float | None:
    """Bytes a second at which the disk of a folder, or of its nearest parent, takes a file.

    None where it takes none, which the growth itself would say.
    """
    while not folder.is_dir():
        folder = folder.parent
    data = os.urandom(PIECE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(_TRIAL_BYTES // PIECE_BYTES):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _TRIAL_BYTES / (time.perf_counter() - started)
    except OSError:
        return None
