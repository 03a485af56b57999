"""Committed checkpoints of a live engine."""

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
from lag_megatron.config import RunConfig
from lag_megatron.distributed.world import World
from lag_megatron.engine.ema import WeightAverage
from lag_megatron.engine.engine import Engine
from lag_megatron.growth.apply.grown_state import GrownState

VERSIONS = {"lag_megatron": __version__, "torch": torch.__version__}


def save_engine(
    engine: Engine,
    path: Path,
    *,
    step: int,
    tokens: int,
    history: list[Mapping[str, Any]],
    growth: GrownState | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Save the engine's state as the tag directory ``path``, whole or not at all.

    Args:
        engine: every rank calls with its own.
        path: the tag directory to come.
        step: optimizer steps taken in the whole run.
        tokens: tokens seen in the whole run.
        history: the growth plans that led to this model, oldest first.
        growth: what the state began as, if it was grown in place: then each rank writes its own
            files without DeepSpeed.
        average: to be saved with a state that was grown in place.

    Raises:
        CheckpointError: if there is no room; where writing fails all the same, the rank ends with
            its message and exit code 2.
    """
    world, config = engine.world, engine.config
    draft = manifest.temporary(path)

    def prepare() -> bool:
        if manifest.is_committed(path):
            return False  # a resumed run came to the same step again
        manifest.remove_checkpoint(draft)
        manifest.remove_checkpoint(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.require_space(path.parent, needed=engine.bytes_on_disk, what="a checkpoint")
        return True

    if not world.from_coordinator(prepare):
        return
    state = _client_state(config, step=step, tokens=tokens, history=history)
    if growth is None:
        world.from_each(lambda: _written(engine, draft, state))
        parts = world.from_each(lambda: _sealed(world, draft, engine.topology))
    else:
        world.from_coordinator(lambda: draft.mkdir())
        parts = world.from_each(lambda: _written_live(engine, draft, growth, state, average))
    files = {name: entry for part in parts for name, entry in part.items()}
    about = {"step": step, "growth_history": list(history), "versions": VERSIONS}
    world.from_coordinator(lambda: manifest.commit(path, files=files, about=about))


def _written_live(
    engine: Engine,
    draft: Path,
    growth: GrownState,
    state: Mapping[str, Any],
    average: WeightAverage | None,
) -> dict[str, Any]:
    """Manifest entries of this rank's files."""
    entries = engine.live.write(draft, growth, client_state=state)
    if average is not None:
        entries |= average.save(draft, rank=engine.world.rank, size=engine.world.size)
    return entries


def _client_state(
    config: RunConfig, *, step: int, tokens: int, history: list[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": tokens,
        "model": asdict(config.model),
        "growth_history": list(history),
    }


def _written(engine: Engine, draft: Path, state: Mapping[str, Any]) -> None:
    try:
        engine.save(draft.parent, draft.name, client_state=state)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError.  The other ranks wait inside DeepSpeed for
        # this one; only its end releases them, through the launcher.
        message = (
            f"[rank {engine.world.rank}] CheckpointError: {draft}: cannot write the checkpoint: "
            f"{str(error).splitlines()[0]}. The one before is untouched. Free some space and run "
            "the same command again."
        )
        print(message, file=sys.stderr, flush=True)
        os._exit(2)


def _sealed(world: World, folder: Path, topology: Topology) -> dict[str, Any]:
    """Manifest entries of this rank's files; it hashes its own, which others may not see yet."""
    mine = files_of_rank(topology, **world.place)
    return {name: manifest.file_entry(folder / name) for name in mine}
