"""Estimating bytes, memory and seconds of growing a checkpoint."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.optimizer_states import adam_state_of, state_shape, states_of
from lag_megatron.checkpoint.state.spec import DTYPES
from lag_megatron.checkpoint.state.tensor_parallel import cut_dim
from lag_megatron.checkpoint.writer.context import BUFFER_BYTES
from lag_megatron.checkpoint.writer.pieces import PIECE_BYTES
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.growth_map import Copy
from lag_megatron.growth.weight_init import Diagonals, Normal

_BYTES = 4
_TRIAL_BYTES = 1 << 26
# Memory for drawing values beside the buffer: a few arrays of doubles for 2**18 elements.
_DRAWING_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class GrowthEstimate:
    """Bytes and seconds that growing a checkpoint will take.

    Attributes:
        read: bytes of the source that are read, each counted once.
        write: bytes of the target's tensors.
        memory: bytes of anonymous memory of all workers, above that of the idle program.
        seconds: at the measured write rate of the disk; None if it could not be measured.
    """

    read: int
    write: int
    memory: int
    seconds: float | None


def estimate_growth(
    grown: GrownState, *, workers: int, folder: Path | None = None
) -> GrowthEstimate:
    """Estimate bytes, memory and seconds of writing a grown state.

    Args:
        grown: the grown state.
        workers: threads that write.
        folder: where the target will be; the write rate of its disk is measured with an unnamed
            temporary file.  Without it ``seconds`` is None.
    """
    shapes = {**grown.source.layout.shapes, **grown.source.frozen.shapes}
    optimizer = grown.layout.optimizer
    width = DTYPES[grown.source.topology.precision].itemsize
    used = {
        (state, origin.parameter)
        for name, blocks in grown.growth_map.blocks.items()
        for block in blocks
        for state in states_of(optimizer, grown.layout.shapes.get(name))
        if isinstance(origin := block.sources[adam_state_of(state)], Copy)
        and (state == "fp32" or name not in grown.frozen.shapes)
    }
    tensor_size = grown.source.topology.tensor_size
    read = sum(
        numel(state_shape(state, shapes[name]))
        * (width if name in grown.source.frozen.shapes else _BYTES)
        * (1 if cut_dim(name) is None else tensor_size)
        for state, name in used
    )
    draws = any(
        isinstance(origin, Normal) or (isinstance(origin, Diagonals) and origin.rest)
        for blocks in grown.growth_map.blocks.values()
        for block in blocks
        for origin in block.sources.values()
    )
    memory = workers * (BUFFER_BYTES + (_DRAWING_BYTES if draws else 0))
    write = grown.bytes_to_write
    rate = None if folder is None else _write_rate(folder)
    return GrowthEstimate(read, write, memory, write / rate if rate else None)


def _write_rate(folder: Path) -> float | None:
    """Bytes a second that can be written to the disk of a folder, or of its nearest parent.

    None if it cannot be written to; growing would report why.
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
