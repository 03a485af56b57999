"""Committed checkpoints of an engine's state."""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lag_megatron import __version__
from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.file_names import files_of_rank
from lag_megatron.config import ModelConfig
from lag_megatron.distributed.world import World
from lag_megatron.engine.ema import WeightAverage
from lag_megatron.engine.protocol import SaveableEngine
from lag_megatron.errors import write_failure
from lag_megatron.growth.apply.grown_state import GrownState

VERSIONS = {"lag_megatron": __version__, "torch": torch.__version__}


def save_engine(
    engine: SaveableEngine,
    path: Path,
    *,
    step: int,
    tokens: int,
    history: list[Mapping[str, Any]],
    growth: GrownState | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Save the engine's state as the tag directory ``path``, atomically.

    Args:
        engine: every rank of its world calls with its own.
        path: the tag directory to come.
        step: optimizer steps taken in the whole run.
        tokens: tokens seen in the whole run.
        history: the growth plans that led to this model, oldest first.
        growth: what the state began as, if it was grown in place: then each rank writes its own
            files without DeepSpeed.
        average: to be saved with a state that was grown in place.

    Raises:
        CheckpointError: if there is too little space.  If a write by DeepSpeed fails all the same,
            the rank ends with a message and exit code 2.
    """
    world = engine.world
    draft = manifest.temporary(path)

    def prepare() -> bool:
        if manifest.is_committed(path):
            return False  # a resumed run came to the same step again
        manifest.remove_checkpoint(draft)
        manifest.remove_checkpoint(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.require_space(path.parent, needed=engine.bytes_on_disk, what="a checkpoint")
        return True

    if not world.run_on_rank0(prepare):
        return
    state = _client_state(engine.model_config, step=step, tokens=tokens, history=history)
    if growth is None:
        world.run_on_all_ranks(lambda: _write_with_deepspeed(engine, draft, state))
        parts = world.run_on_all_ranks(lambda: _file_entries(world, draft, engine.topology))
    else:
        world.run_on_rank0(lambda: draft.mkdir())
        parts = world.run_on_all_ranks(lambda: _write_grown(engine, draft, growth, state, average))
    files = {name: entry for part in parts for name, entry in part.items()}
    metadata = {"step": step, "growth_history": list(history), "versions": VERSIONS}
    world.run_on_rank0(lambda: manifest.commit(path, files=files, metadata=metadata))


def _write_grown(
    engine: SaveableEngine,
    draft: Path,
    growth: GrownState,
    state: Mapping[str, Any],
    average: WeightAverage | None,
) -> dict[str, Any]:
    """Write this rank's files of a state that was grown in place; returns manifest entries."""
    entries = engine.state.write(draft, growth, client_state=state)
    if average is not None:
        entries |= average.save(draft, rank=engine.world.rank, size=engine.world.size)
    return entries


def _client_state(
    model: ModelConfig, *, step: int, tokens: int, history: list[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": tokens,
        "model": asdict(model),
        "growth_history": list(history),
    }


def _write_with_deepspeed(engine: SaveableEngine, draft: Path, state: Mapping[str, Any]) -> None:
    try:
        engine.save(draft.parent, draft.name, client_state=state)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError.  The other ranks wait inside DeepSpeed for
        # this one; only its end releases them, through the launcher.
        reason, advice = write_failure(error)
        message = (
            f"[rank {engine.world.rank}] CheckpointError: {draft}: cannot write the checkpoint: "
            f"{reason} The one before is untouched. {advice}"
        )
        print(message, file=sys.stderr, flush=True)
        os._exit(2)


def _file_entries(world: World, folder: Path, topology: Topology) -> dict[str, Any]:
    """Manifest entries of this rank's files; it hashes its own, which others may not see yet."""
    mine = files_of_rank(topology, **world.coords)
    return {name: manifest.file_entry(folder / name) for name in mine}
