"""Growing a universal checkpoint by hard links: only new values are written.

In a universal checkpoint every state of a parameter is a file, so a duplicated layer is a set of
hard links.  ``hardlink_dcp`` does the same for distributed checkpoints.  The target has to be on
the source's file system.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.layout import STATES, State, Topology
from lag_megatron.checkpoint.state.optimizer_states import adam_state_of
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.universal.format import FOLDER
from lag_megatron.checkpoint.universal.writer import universal_job, write_states
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.apply.conversion import unsharded_state
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.apply.trainer_folder import trainer_files
from lag_megatron.growth.growth_map import Copy


def hardlink_universal(grown: GrownState, target: Path) -> WriteJob:
    """The job that grows a universal checkpoint, for training under the same topology.

    Args:
        grown: of a universal checkpoint, under the topology of one rank without ZeRO.
        target: the tag directory to write.
    """
    header = grown.source.header
    config, degrees = header["ds_config"], header.get("checkpoint_parallel_dimensions") or {}
    enabled = [p for p in ("bf16", "fp16") if (config.get(p) or {}).get("enabled")]
    topology = Topology(
        zero_stage=int((config.get("zero_optimization") or {}).get("stage", 1)),
        data_size=int(header["dp_world_size"]),
        tensor_size=int(degrees.get("tp_degree", header["mp_world_size"])),
        precision=enabled[0] if enabled else "fp32",  # type: ignore[arg-type]
    )
    state, templates = unsharded_state(grown), FileTemplateCache()
    job = universal_job(state, target, topology, metadata=grown.metadata)
    parts = [
        Part(part.name, partial(_hardlink_parameter, grown, state, templates, part.name))
        if part.name in grown.growth_map.blocks
        else part
        for part in job.parts
    ]
    ranks = topology.data_size * topology.tensor_size
    return replace(
        job,
        parts=parts,
        needed=_new_bytes(grown),
        title="what is not linked",
        beside=trainer_files(grown, target, ranks=ranks).write,
    )


def _hardlink_parameter(
    grown: GrownState,
    state: UnshardedState,
    templates: FileTemplateCache,
    name: str,
    folder: Path,
    context: WriteContext,
) -> Mapping[str, Any]:
    """Write a parameter's folder: hard links for copied states, files for new ones."""
    place, source = folder / FOLDER / name, grown.source.path / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    # All parameters of a group have taken the same steps; after ZeRO-3 no file says how many.
    like = next(file for file in sorted(source.iterdir()) if file.is_dir())
    origins: dict[str, str | None] = {s: origin_of(grown, name, s) for s in STATES}
    if state.is_trained(name) and (like / "step.pt").is_file():
        origins["step"] = next((o for o in origins.values() if o is not None), None)
    kept = {kind: source / str(origin) / f"{kind}.pt" for kind, origin in origins.items() if origin}
    entries = dict(
        hardlink_file(file, place / file.name, folder, grown.source.path)
        for file in kept.values()
        if file.is_file()
    )
    new_states = [kind for kind, origin in origins.items() if origin is None]
    return entries | write_states(state, name, new_states, folder, context, templates)


def hardlink_file(
    file: Path, place: Path, folder: Path, source: Path
) -> tuple[str, dict[str, Any]]:
    """Hard-link a file of a checkpoint into another, and return its name and manifest entry.

    Args:
        file: to link.
        place: path of the link.
        folder: the staging directory that holds it.
        source: the checkpoint that holds ``file``.

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


def origin_of(grown: GrownState, name: str, state: State) -> str | None:
    """The old parameter that a grown one copies bit for bit; None if its values are new."""
    block, *others = grown.growth_map.blocks[name]
    origin = block.sources[adam_state_of(state)]
    if others or not isinstance(origin, Copy) or any(origin.low) or origin.scale != 1:
        return None
    shapes = {**grown.source.layout.shapes, **grown.source.frozen.shapes}
    return origin.parameter if shapes[origin.parameter] == block.box.shape else None


def _new_bytes(grown: GrownState) -> int:
    """Bytes of masters and moments that have to be written."""
    shapes = grown.layout.shapes
    return sum(
        4 * numel(shape)
        for name, shape in shapes.items()
        for state in STATES
        if origin_of(grown, name, state) is None
    )
