"""The objects of a rank's model file, with room where weights will go.

Counters and whatever else a program keeps there come from a template checkpoint of any ZeRO stage.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import unsharded_layout
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.spec import (
    DTYPES,
    CheckpointSpec,
    PlaceholderTensors,
    ds_config_of,
)
from lag_megatron.checkpoint.zero.optim_states import unpartitioned_optimizer


def model_objects(
    draft: CheckpointSpec, *, tensor_rank: int, data_rank: int, room: PlaceholderTensors
) -> dict[str, Any]:
    """The objects of a rank's model file."""
    topology, old = draft.topology, _old_model(draft, tensor_rank, data_rank)
    whole = _whole_weights(draft, room)
    parts = _frozen_parts(draft, data_rank, room) if topology.zero_stage == 3 else whole
    lists_frozen = topology.zero_stage > 1
    buffers = set(old.get("buffer_names") or ())
    shared = dict(draft.aliases) if tensor_rank == data_rank == 0 else {}  # as DeepSpeed lists them
    tree = {
        **old,
        **draft.entries,
        "module": _module(draft, old["module"], whole),
        "buffer_names": [name for name, before in draft.names.items() if before in buffers],
        "optimizer": unpartitioned_optimizer(draft, room) if topology.zero_stage == 0 else None,
        "param_shapes": _listed_shapes(draft) if topology.zero_stage else None,
        "shared_params": shared if topology.zero_stage else None,
        "frozen_param_shapes": _sizes(draft.frozen.shapes) if lists_frozen else None,
        "frozen_param_fragments": (
            OrderedDict((n, parts[n]) for n in draft.frozen.shapes) if lists_frozen else None
        ),
        "dp_world_size": topology.data_size,
        "mp_world_size": topology.tensor_size,
        "ds_config": ds_config_of(draft),
    }
    if "checkpoint_parallel_dimensions" in old:
        tree["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": topology.tensor_size}
    return tree


def _old_model(draft: CheckpointSpec, tensor_rank: int, data_rank: int) -> Any:
    """The template's file of the same rank; where there is none, the first rank's."""
    old = draft.template.topology
    return draft.template.model_states(
        tensor_rank if tensor_rank < old.tensor_size else 0,
        data_rank if data_rank < old.data_size else 0,
    )


def _whole_weights(draft: CheckpointSpec, room: PlaceholderTensors) -> dict[str, Tensor]:
    """Room for the weights that a model file holds whole, by name."""
    if draft.topology.zero_stage == 3:
        return {}
    dtype, weights = DTYPES[draft.topology.precision], {}
    for layout, trained in ((draft.layout, True), (draft.frozen, False)):
        for name, parts in unsharded_layout(layout.shapes).segments.items():
            region = Region(
                "fp32", ((name, parts[0]),), parts[0].length, trained=trained, forward=True
            )
            weights[name] = room(region, layout.shapes[name], dtype)
    return weights


def _frozen_parts(
    draft: CheckpointSpec, data_rank: int, room: PlaceholderTensors
) -> dict[str, Tensor]:
    """Room for a rank's parts of the parameters that are not trained (ZeRO-3)."""
    names, dtype = list(draft.frozen.shapes), DTYPES[draft.topology.precision]
    return {
        names[container.key]: room(
            Region("fp32", held, draft.frozen.lengths[container], trained=False, forward=True),
            dtype=dtype,
        )
        for container, held in draft.frozen.held(data_rank).items()
    }


def _module(
    draft: CheckpointSpec, old: Mapping[str, Any], whole: Mapping[str, Tensor]
) -> "OrderedDict[str, Any]":
    module: OrderedDict[str, Any] = OrderedDict()
    for name, before in draft.names.items():
        owner = draft.aliases.get(name, name)
        if owner not in draft.layout.shapes and owner not in draft.frozen.shapes:
            module[name] = old[before]
        elif draft.topology.zero_stage == 3:
            module[name] = torch.empty(0, dtype=DTYPES[draft.topology.precision])
        else:
            module[name] = whole[owner]
    return module


def _sizes(shapes: Mapping[str, Shape]) -> "OrderedDict[str, torch.Size]":
    return OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())


def _listed_shapes(draft: CheckpointSpec) -> list[Any]:
    groups = draft.layout.groups
    if draft.topology.zero_stage != 3:
        return [_sizes(group) for group in groups]
    return [_sizes({n: groups[g][n] for n in names}) for g, names in draft.layout.subgroups]
