"""A training state as DeepSpeed's universal checkpoint, written directly.

``ds_to_universal`` stops at the empty entries of Megatron-Core's models, and merges tensor-parallel
parts wrongly unless it is told by patterns how each was cut; here the table of cuts tells.  What is
written loads under ZeRO 1, 2 and 3: a state's file is a dictionary as of ZeRO 1 and 2, which stage
3 takes as well, and ``optimizer_state.pt`` holds the entries that either of them looks for.
"""

import itertools
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.layout import STATES, Topology
from lag_megatron.checkpoint.state.spec import CheckpointSpec, PlaceholderTensors, ds_config_of
from lag_megatron.checkpoint.state.tensor_parallel import (
    cut_dim,
    is_gated,
    local_shape,
    may_be_gated,
)
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.storage.integrity import EVERYTHING
from lag_megatron.checkpoint.universal.format import FOLDER, OPTIMIZER, POINTER
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.file_writer import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.checkpoint.zero.file_names import model_file
from lag_megatron.checkpoint.zero.writer import write_objects
from lag_megatron.errors import CheckpointError

_VERSION = 0.4  # of the format, as DeepSpeed 0.19 writes it
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def universal_job(
    state: UnshardedState, target: Path, topology: Topology, *, about: Mapping[str, Any]
) -> WriteJob:
    """What has to be written as the tag directory ``target``.

    Args:
        state: what is written.
        target: the directory to come.
        topology: of the job that will load it: DeepSpeed takes counters from model files of the
            loading rank's name, which ZeRO-3 has one of for each rank.
        about: entries of the manifest.

    Raises:
        CheckpointError: for a state that the format does not hold.
    """
    if state.draft.layout.optimizer != "adamw":
        raise CheckpointError(
            f"{state.path}: the universal format holds Adam's moments, and this is the state of "
            f"{state.draft.layout.optimizer}. Convert to zero."
        )
    draft, moulds = replace(state.draft, topology=topology), FileTemplateCache()
    moments = sum(map(numel, state.draft.layout.shapes.values())) * 4 * len(STATES)
    weights = sum(map(numel, state.draft.frozen.shapes.values())) * 4
    return WriteJob(
        target=target,
        parts=[
            *(Part(name, partial(_write_parameter, state, moulds, name)) for name in state.shapes),
            Part("optimizer", partial(_write_optimizer, draft)),
            Part("model", partial(_write_models, state, draft)),
        ],
        about={**about, "written_as": "universal", "topology": asdict(topology)},
        needed=moments + weights,
        what="the universal checkpoint",
        check=partial(state.check, EVERYTHING),
        pointer=POINTER,
    )


def _write_parameter(
    state: UnshardedState, moulds: FileTemplateCache, name: str, folder: Path, crew: WriteContext
) -> dict[str, Any]:
    """A parameter's folder."""
    return write_states(state, name, (*STATES, "step"), folder, crew, moulds)


def write_states(
    state: UnshardedState,
    name: str,
    kinds: Collection[str],
    folder: Path,
    crew: WriteContext,
    moulds: FileTemplateCache,
) -> dict[str, Any]:
    """Some of the files of a parameter's folder, and their manifest entries.

    Args:
        state: what is written.
        name: of the parameter.
        kinds: states, and ``step``; of a parameter that is not trained there are only weights.
        folder: of the checkpoint.
        crew: told of each piece, and of each finished file.
        moulds: of the files of a checkpoint.
    """
    (folder / FOLDER / name).mkdir(parents=True, exist_ok=True)
    shape, trained = state.shapes[name], state.is_trained(name)
    entries: dict[str, Any] = {}

    def write(what: str, objects: Any, room: PlaceholderTensors) -> None:
        file = f"{FOLDER}/{name}/{what}.pt"
        entries[file] = write_objects(folder / file, objects, room, state.fill, crew, moulds)

    for kept in (s for s in (STATES if trained else STATES[:1]) if s in kinds):
        room = PlaceholderTensors()
        values = room(state.region(name, kept), shape)
        cut = _cut(state, name) if trained else {}
        write(kept, {**cut, "param": values}, room)
    if trained and "step" in kinds:
        write("step", _step(state.draft, name), PlaceholderTensors())
    return entries


def _cut(state: UnshardedState, name: str) -> dict[str, Any]:
    """How tensor parallelism cuts a parameter, in DeepSpeed's words."""
    dim = cut_dim(name)
    if dim is None:
        return {}
    found: dict[str, Any] = {"cat_dim": dim}
    if may_be_gated(name) and is_gated(state.shapes):
        found["param_n_sub_params"] = 2
    if name in _VOCABULARY:
        found["vocab_tensor"] = True  # a job whose padding is larger adds rows
    return found


def _step(draft: CheckpointSpec, name: str) -> torch.Tensor:
    (number,) = (n for n, group in enumerate(draft.layout.groups) if name in group)
    return torch.as_tensor(draft.groups[number].counters["step"]).clone()


def _write_optimizer(draft: CheckpointSpec, folder: Path, crew: WriteContext) -> dict[str, Any]:
    """What the optimizer keeps beside the parameters' states."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    groups = [{**group.settings, "params": [n]} for n, group in enumerate(draft.groups)]
    steps = {n: dict(group.counters) for n, group in enumerate(draft.groups)}
    config = draft.template.header.get("ds_config") or {}
    clip = {"clip_grad": float(config.get("gradient_clipping") or 0.0)} if config else {}
    objects = {
        "loss_scaler": draft.loss_scale.as_object(),
        "dynamic_loss_scale": draft.loss_scale.dynamic,
        "overflow": False,
        **clip,
        "zero_stage": torch_pickle.ZeroStage(draft.topology.zero_stage),
        "partition_count": draft.topology.data_size,
        "ds_version": draft.template.header["ds_version"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": steps, "param_groups": groups},
    }
    file = f"{FOLDER}/{OPTIMIZER}"
    return {file: write_objects(folder / file, objects, PlaceholderTensors(), _no_values, crew)}


def _write_models(
    state: UnshardedState, draft: CheckpointSpec, folder: Path, crew: WriteContext
) -> dict[str, Any]:
    """Model files without weights: DeepSpeed takes those from the parameters' folders."""
    topology, entries = draft.topology, dict[str, Any]()
    for tensor_rank, data_rank in itertools.product(
        range(topology.tensor_size), range(topology.data_size)
    ):
        name = model_file(topology, tensor_rank=tensor_rank, data_rank=data_rank)
        if name not in entries:
            objects = _model(state, draft)
            entries[name] = write_objects(
                folder / name, objects, PlaceholderTensors(), _no_values, crew
            )
    return entries


def _model(state: UnshardedState, draft: CheckpointSpec) -> dict[str, Any]:
    topology = draft.topology
    gated = is_gated(state.shapes)

    def sizes(shapes: Mapping[str, tuple[int, ...]]) -> "OrderedDict[str, torch.Size]":
        return OrderedDict(
            (n, torch.Size(local_shape(n, s, tensor_size=topology.tensor_size, gated=gated)))
            for n, s in shapes.items()
        )

    old = draft.template.header["module"]
    known = {*state.shapes, *draft.aliases}  # buffers and empty entries stay as they are
    module = {new: torch.empty(0) if new in known else old[n] for new, n in draft.names.items()}
    return {
        **draft.template.header,
        **draft.entries,
        "module": OrderedDict(module),
        "optimizer": None,
        "param_shapes": [sizes(group) for group in draft.layout.groups],
        "shared_params": dict(draft.aliases),
        "frozen_param_shapes": sizes(draft.frozen.shapes) if draft.frozen.shapes else None,
        "frozen_param_fragments": None,
        "dp_world_size": topology.data_size,
        "mp_world_size": topology.tensor_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": topology.tensor_size},
        "ds_config": ds_config_of(draft),
        "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION},
    }


class _NoValues:
    """For files whose tensors are all there."""

    def expect(self, region: object) -> None:
        """Never called: there is no region."""

    def __call__(self, region: object, buffer: object) -> None:
        """Never called."""


_no_values = _NoValues()
