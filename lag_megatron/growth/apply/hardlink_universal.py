"""Growth that writes almost nothing: old values are linked, and only new ones are written.

Here of universal checkpoints, in which every state of a parameter is a file, which a duplicate
shares by a hard link; ``linked_dcp`` has the others.  Both need the source's file system.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.layout import STATES, State, Topology
from lag_megatron.checkpoint.state.optimizer_states import role_of
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.universal.format import FOLDER
from lag_megatron.checkpoint.universal.writer import universal_job, write_states
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.file_writer import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.apply.conversion import unsharded_state
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.growth_map import Copy


def hardlink_universal(growth: GrownState, target: Path) -> WriteJob:
    """The order for a grown universal checkpoint of one, for a job of the same topology.

    Args:
        growth: of a universal checkpoint, under the topology of one rank without ZeRO.
        target: the tag directory to come.
    """
    header = growth.source.header
    config, degrees = header["ds_config"], header.get("checkpoint_parallel_dimensions") or {}
    enabled = [p for p in ("bf16", "fp16") if (config.get(p) or {}).get("enabled")]
    topology = Topology(
        zero_stage=int((config.get("zero_optimization") or {}).get("stage", 1)),
        data_size=int(header["dp_world_size"]),
        tensor_size=int(degrees.get("tp_degree", header["mp_world_size"])),
        precision=enabled[0] if enabled else "fp32",  # type: ignore[arg-type]
    )
    state, moulds = unsharded_state(growth), FileTemplateCache()
    order = universal_job(state, target, topology, about=growth.about)
    parts = [
        Part(part.name, partial(_hardlink_parameter, growth, state, moulds, part.name))
        if part.name in growth.growth_map.blocks
        else part
        for part in order.parts
    ]
    return replace(order, parts=parts, needed=_new_bytes(growth), what="what is not linked")


def _hardlink_parameter(
    growth: GrownState,
    whole: UnshardedState,
    moulds: FileTemplateCache,
    name: str,
    folder: Path,
    crew: WriteContext,
) -> Mapping[str, Any]:
    """A parameter's folder: hard links of the states that are another's, files of the others."""
    place, source = folder / FOLDER / name, growth.source.path / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    # All parameters of a group have taken the same steps; after ZeRO-3 no file says how many.
    like = next(file for file in sorted(source.iterdir()) if file.is_dir())
    origins: dict[str, str | None] = {s: origin_of(growth, name, s) for s in STATES}
    if whole.is_trained(name) and (like / "step.pt").is_file():
        origins["step"] = next((o for o in origins.values() if o is not None), None)
    kept = {kind: source / str(origin) / f"{kind}.pt" for kind, origin in origins.items() if origin}
    entries = dict(
        hardlink_file(file, place / file.name, folder, growth.source.path)
        for file in kept.values()
        if file.is_file()
    )
    fresh = [kind for kind, origin in origins.items() if origin is None]
    return entries | write_states(whole, name, fresh, folder, crew, moulds)


def hardlink_file(
    file: Path, place: Path, folder: Path, source: Path
) -> tuple[str, dict[str, Any]]:
    """Link a file of a checkpoint into a draft; its name there and its manifest entry.

    Raises:
        CheckpointError: if the two are not on one file system.
    """
    try:
        place.unlink(missing_ok=True)
        os.link(file, place)
    except OSError as error:
        raise CheckpointError(
            f"{place}: cannot be linked to {file}: {error.strerror}. Linked growth needs a target "
            "on the source's file system; leave out --link elsewhere."
        ) from None
    name = str(file.relative_to(source))
    known = (
        manifest.read_manifest(source)["files"].get(name) if manifest.is_committed(source) else None
    )
    entry = dict(known) if known is not None else manifest.file_entry(file)
    return str(place.relative_to(folder)), {**entry, manifest.SHARED: name}


def origin_of(growth: GrownState, name: str, state: State) -> str | None:
    """The old parameter whose values a grown one has, bit for bit; None if its own are new."""
    block, *others = growth.growth_map.blocks[name]
    origin = block.sources[role_of(state)]
    if others or not isinstance(origin, Copy) or any(origin.low) or origin.scale != 1:
        return None
    shapes = {**growth.source.layout.shapes, **growth.source.frozen.shapes}
    return origin.parameter if shapes[origin.parameter] == block.box.shape else None


def _new_bytes(growth: GrownState) -> int:
    """Bytes of masters and moments that have to be written."""
    shapes = growth.layout.shapes
    return sum(
        4 * numel(shape)
        for name, shape in shapes.items()
        for state in STATES
        if origin_of(growth, name, state) is None
    )
