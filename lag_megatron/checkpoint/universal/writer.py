"""Writing a training state as DeepSpeed's universal checkpoint, without ``ds_to_universal``.

That tool fails on the empty entries of Megatron-Core's models, and needs patterns for the dimension
along which each parameter is sharded, which are a table here.  The checkpoint loads under ZeRO 1, 2
and 3: a state's file is a dictionary as from ZeRO 1 and 2, which stage 3 loads too, and
``optimizer_state.pt`` holds the entries that any stage reads.
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
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.checkpoint.zero.file_names import model_file
from lag_megatron.checkpoint.zero.writer import write_objects
from lag_megatron.errors import CheckpointError

_VERSION = 0.4  # of the format, as DeepSpeed 0.19 writes it
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def universal_job(
    state: UnshardedState, target: Path, topology: Topology, *, metadata: Mapping[str, Any]
) -> WriteJob:
    """The job that writes the tag directory ``target``.

    Args:
        state: the training state.
        target: the directory to write.
        topology: of the training that will load it: DeepSpeed loads counters from a model file
            named after the loading rank, and ZeRO-3 has such a file for each rank.
        metadata: entries of the manifest.

    Raises:
        CheckpointError: if the format cannot hold the state.
    """
    if state.spec.layout.optimizer != "adamw":
        raise CheckpointError(
            f"{state.path}: the universal format holds Adam's moments, and this is the state of "
            f"{state.spec.layout.optimizer}. Convert to zero."
        )
    spec, templates = replace(state.spec, topology=topology), FileTemplateCache()
    moments = sum(map(numel, state.spec.layout.shapes.values())) * 4 * len(STATES)
    weights = sum(map(numel, state.spec.frozen.shapes.values())) * 4
    return WriteJob(
        target=target,
        source=state.path,
        parts=[
            *(
                Part(name, partial(_write_parameter, state, templates, name))
                for name in state.shapes
            ),
            Part("optimizer", partial(_write_optimizer, spec)),
            Part("model", partial(_write_models, state, spec)),
        ],
        metadata={**metadata, "written_as": "universal", "topology": asdict(topology)},
        needed=moments + weights,
        title="the universal checkpoint",
        check=partial(state.check, EVERYTHING),
        pointer=POINTER,
    )


def _write_parameter(
    state: UnshardedState,
    templates: FileTemplateCache,
    name: str,
    folder: Path,
    context: WriteContext,
) -> dict[str, Any]:
    """Write a parameter's folder."""
    return write_states(state, name, (*STATES, "step"), folder, context, templates)


def write_states(
    state: UnshardedState,
    name: str,
    kinds: Collection[str],
    folder: Path,
    context: WriteContext,
    templates: FileTemplateCache,
) -> dict[str, Any]:
    """Write some files of a parameter's folder, and return their manifest entries.

    Args:
        state: the training state.
        name: of the parameter.
        kinds: states and ``step``; a parameter that is not trained has only ``fp32``.
        folder: of the checkpoint.
        context: callbacks and buffers.
        templates: of the checkpoint's files.
    """
    (folder / FOLDER / name).mkdir(parents=True, exist_ok=True)
    shape, trained = state.shapes[name], state.is_trained(name)
    entries: dict[str, Any] = {}

    def write(what: str, objects: Any, placeholders: PlaceholderTensors) -> None:
        file = f"{FOLDER}/{name}/{what}.pt"
        entries[file] = write_objects(
            folder / file, objects, placeholders, state.fill, context, templates
        )

    for kept in (s for s in (STATES if trained else STATES[:1]) if s in kinds):
        placeholders = PlaceholderTensors()
        values = placeholders(state.region(name, kept), shape)
        cut = _cut(state, name) if trained else {}
        write(kept, {**cut, "param": values}, placeholders)
    if trained and "step" in kinds:
        write("step", _step(state.spec, name), PlaceholderTensors())
    return entries


def _cut(state: UnshardedState, name: str) -> dict[str, Any]:
    """DeepSpeed's entries for how tensor parallelism shards a parameter."""
    dim = cut_dim(name)
    if dim is None:
        return {}
    found: dict[str, Any] = {"cat_dim": dim}
    if may_be_gated(name) and is_gated(state.shapes):
        found["param_n_sub_params"] = 2
    if name in _VOCABULARY:
        found["vocab_tensor"] = True  # a job whose padding is larger adds rows
    return found


def _step(spec: CheckpointSpec, name: str) -> torch.Tensor:
    (number,) = (n for n, group in enumerate(spec.layout.groups) if name in group)
    return torch.as_tensor(spec.groups[number].counters["step"]).clone()


def _write_optimizer(spec: CheckpointSpec, folder: Path, context: WriteContext) -> dict[str, Any]:
    """Write the optimizer's settings and counters."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    groups = [{**group.settings, "params": [n]} for n, group in enumerate(spec.groups)]
    steps = {n: dict(group.counters) for n, group in enumerate(spec.groups)}
    config = spec.template.header.get("ds_config") or {}
    clip = {"clip_grad": float(config.get("gradient_clipping") or 0.0)} if config else {}
    objects = {
        "loss_scaler": spec.loss_scale.as_object(),
        "dynamic_loss_scale": spec.loss_scale.dynamic,
        "overflow": False,
        **clip,
        "zero_stage": torch_pickle.ZeroStage(spec.topology.zero_stage),
        "partition_count": spec.topology.data_size,
        "ds_version": spec.template.header["ds_version"],
        "param_groups": groups,
        "optimizer_state_dict": {"state": steps, "param_groups": groups},
    }
    file = f"{FOLDER}/{OPTIMIZER}"
    return {file: write_objects(folder / file, objects, PlaceholderTensors(), _no_values, context)}


def _write_models(
    state: UnshardedState, spec: CheckpointSpec, folder: Path, context: WriteContext
) -> dict[str, Any]:
    """Write model files without weights, which DeepSpeed loads from the parameters' folders."""
    topology, entries = spec.topology, dict[str, Any]()
    for tensor_rank, data_rank in itertools.product(
        range(topology.tensor_size), range(topology.data_size)
    ):
        name = model_file(topology, tensor_rank=tensor_rank, data_rank=data_rank)
        if name not in entries:
            objects = _model(state, spec)
            entries[name] = write_objects(
                folder / name, objects, PlaceholderTensors(), _no_values, context
            )
    return entries


def _model(state: UnshardedState, spec: CheckpointSpec) -> dict[str, Any]:
    topology = spec.topology
    gated = is_gated(state.shapes)

    def sizes(shapes: Mapping[str, tuple[int, ...]]) -> "OrderedDict[str, torch.Size]":
        return OrderedDict(
            (n, torch.Size(local_shape(n, s, tensor_size=topology.tensor_size, gated=gated)))
            for n, s in shapes.items()
        )

    old = spec.template.header["module"]
    known = {*state.shapes, *spec.aliases}  # buffers and empty entries stay as they are
    module = {new: torch.empty(0) if new in known else old[n] for new, n in spec.names.items()}
    return {
        **spec.template.header,
        **spec.entries,
        "module": OrderedDict(module),
        "optimizer": None,
        "param_shapes": [sizes(group) for group in spec.layout.groups],
        "shared_params": dict(spec.aliases),
        "frozen_param_shapes": sizes(spec.frozen.shapes) if spec.frozen.shapes else None,
        "frozen_param_fragments": None,
        "dp_world_size": topology.data_size,
        "mp_world_size": topology.tensor_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": topology.tensor_size},
        "ds_config": ds_config_of(spec),
        "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION},
    }


class _NoValues:
    """The fill of files without placeholders."""

    def prefetch(self, region: object) -> None:
        """Never called."""

    def __call__(self, region: object, buffer: object) -> None:
        """Never called."""


_no_values = _NoValues()
