"""The objects of a rank's model file, with placeholders for its weights.

Counters and other entries come from a template checkpoint of any ZeRO stage.
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
    spec: CheckpointSpec, *, tensor_rank: int, data_rank: int, placeholders: PlaceholderTensors
) -> dict[str, Any]:
    """The objects of a rank's model file."""
    topology, old = spec.topology, _old_model(spec, tensor_rank, data_rank)
    weights = _unsharded_weights(spec, placeholders)
    parts = _frozen_parts(spec, data_rank, placeholders) if topology.zero_stage == 3 else weights
    lists_frozen = topology.zero_stage > 1
    buffers = set(old.get("buffer_names") or ())
    shared = dict(spec.aliases) if tensor_rank == data_rank == 0 else {}  # as DeepSpeed lists them
    tree = {
        **old,
        **spec.entries,
        "module": _module(spec, old["module"], weights),
        "buffer_names": [name for name, before in spec.names.items() if before in buffers],
        "optimizer": unpartitioned_optimizer(spec, placeholders)
        if topology.zero_stage == 0
        else None,
        "param_shapes": _listed_shapes(spec) if topology.zero_stage else None,
        "shared_params": shared if topology.zero_stage else None,
        "frozen_param_shapes": _sizes(spec.frozen.shapes) if lists_frozen else None,
        "frozen_param_fragments": (
            OrderedDict((n, parts[n]) for n in spec.frozen.shapes) if lists_frozen else None
        ),
        "dp_world_size": topology.data_size,
        "mp_world_size": topology.tensor_size,
        "ds_config": ds_config_of(spec),
    }
    if "checkpoint_parallel_dimensions" in old:
        tree["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": topology.tensor_size}
    return tree


def _old_model(spec: CheckpointSpec, tensor_rank: int, data_rank: int) -> Any:
    """The template's model file of the same rank, or of rank 0 if it has fewer ranks."""
    old = spec.template.topology
    return spec.template.model_states(
        tensor_rank if tensor_rank < old.tensor_size else 0,
        data_rank if data_rank < old.data_size else 0,
    )


def _unsharded_weights(spec: CheckpointSpec, placeholders: PlaceholderTensors) -> dict[str, Tensor]:
    """Placeholders for the weights in a model file, by name; ZeRO-3 has none there."""
    if spec.topology.zero_stage == 3:
        return {}
    dtype, weights = DTYPES[spec.topology.precision], {}
    for layout, trained in ((spec.layout, True), (spec.frozen, False)):
        for name, parts in unsharded_layout(layout.shapes).segments.items():
            region = Region(
                "fp32", ((name, parts[0]),), parts[0].length, trained=trained, forward=True
            )
            weights[name] = placeholders(region, layout.shapes[name], dtype)
    return weights


def _frozen_parts(
    spec: CheckpointSpec, data_rank: int, placeholders: PlaceholderTensors
) -> dict[str, Tensor]:
    """Placeholders for a rank's shards of parameters that are not trained (ZeRO-3)."""
    names, dtype = list(spec.frozen.shapes), DTYPES[spec.topology.precision]
    return {
        names[container.key]: placeholders(
            Region("fp32", held, spec.frozen.lengths[container], trained=False, forward=True),
            dtype=dtype,
        )
        for container, held in spec.frozen.buffers_of_rank(data_rank).items()
    }


def _module(
    spec: CheckpointSpec, old: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> "OrderedDict[str, Any]":
    module: OrderedDict[str, Any] = OrderedDict()
    for name, before in spec.names.items():
        owner = spec.aliases.get(name, name)
        if owner not in spec.layout.shapes and owner not in spec.frozen.shapes:
            module[name] = old[before]
        elif spec.topology.zero_stage == 3:
            module[name] = torch.empty(0, dtype=DTYPES[spec.topology.precision])
        else:
            module[name] = weights[owner]
    return module


def _sizes(shapes: Mapping[str, Shape]) -> "OrderedDict[str, torch.Size]":
    return OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())


def _listed_shapes(spec: CheckpointSpec) -> list[Any]:
    groups = spec.layout.groups
    if spec.topology.zero_stage != 3:
        return [_sizes(group) for group in groups]
    return [_sizes({n: groups[g][n] for n in names}) for g, names in spec.layout.subgroups]
