"""The optimizer's objects in DeepSpeed's forms, with placeholders for masters and moments.

Hyper-parameters and counters come from a template checkpoint of any ZeRO stage.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.layout import STATES, Layout, Segment
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.spec import CheckpointSpec, PlaceholderTensors, ds_config_of
from lag_megatron.checkpoint.storage import torch_pickle


def optimizer_objects(
    spec: CheckpointSpec, *, data_rank: int, placeholders: PlaceholderTensors
) -> dict[str, Any]:
    """The objects of a rank's optimizer file (ZeRO 1 to 3)."""
    template, topology = spec.template, spec.topology
    old: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    if template.topology.zero_stage:
        old = template.optimizer_states(0, 0)
        if _keeps_form(spec):
            optimizer = dict(old["optimizer_state_dict"])
    optimizer |= {
        "loss_scaler": spec.loss_scale.as_object(),
        "dynamic_loss_scale": spec.loss_scale.dynamic,
        "overflow": False,
    }
    build = _by_subgroup if topology.zero_stage == 3 else _by_group
    optimizer |= build(spec, data_rank, placeholders)
    version = spec.template.header["ds_version"]
    return {"ds_version": version, **old, "ds_config": ds_config_of(spec),
            "optimizer_state_dict": optimizer}  # fmt: skip


def unpartitioned_optimizer(
    spec: CheckpointSpec, placeholders: PlaceholderTensors
) -> dict[str, Any]:
    """The optimizer's state in a ZeRO-0 model file: by number of the parameter."""
    layout, numbers = spec.layout, iter(range(len(spec.layout.shapes)))
    segments = list(layout.segments.items())
    moments = [item for item in layout.states.items() if item[0] != "fp32"]
    groups: list[dict[str, Any]] = []
    masters: list[list[Tensor]] = []
    state: dict[int, Any] = {}
    for number, group in enumerate(layout.groups):
        members = [next(numbers) for _ in group]
        groups.append({**spec.groups[number].settings, "params": members})
        masters.append([])
        for key, shape in zip(members, group.values(), strict=True):
            name, (segment,) = segments[key]
            held = ((name, segment),)
            state[key] = _counters(spec.groups[number].counters) | {
                moment: placeholders(Region(moment, *_run(there, name)), there.shapes[name])
                for moment, there in moments
                if name in there.shapes
            }
            if spec.topology.precision != "fp32":
                masters[-1].append(placeholders(Region("fp32", held, segment.length), shape))
    grown = {"state": state, "param_groups": groups}
    if spec.topology.precision == "fp32":
        return grown
    return {
        **spec.loss_scale.as_entries(),
        "optimizer_state_dict": grown,
        "fp32_groups": masters,
    }


def _keeps_form(spec: CheckpointSpec) -> bool:
    """Whether the template's optimizer class is the same: ZeRO 1 and 2 share one."""
    forms = {spec.template.topology.zero_stage == 3, spec.topology.zero_stage == 3}
    return len(forms) == 1


def _entry(
    counters: Mapping[str, Any],
    held: Sequence[tuple[str, Segment]],
    length: int,
    placeholders: PlaceholderTensors,
) -> dict[str, Any]:
    moments = {m: placeholders(Region(m, tuple(held), length)) for m in STATES if m != "fp32"}
    return _counters(counters) | moments


def _counters(counters: Mapping[str, Any]) -> dict[str, Any]:
    # Cloned: parameters that shared one step tensor would each increment it.
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in counters.items()}


def _run(layout: Layout, name: str) -> tuple[tuple[tuple[str, Segment]], int]:
    """The segment of an unsharded parameter's state, and its length."""
    (segment,) = layout.segments[name]
    return ((name, segment),), segment.length


def _by_group(
    spec: CheckpointSpec, data_rank: int, placeholders: PlaceholderTensors
) -> dict[str, Any]:
    """ZeRO 1 and 2: one flat buffer for each parameter group."""
    topology, layout = spec.topology, spec.layout
    held = layout.buffers_of_rank(data_rank)
    state: dict[int, Any] = {}
    masters: list[Tensor] = []
    paddings: list[int] = []
    slices: list[OrderedDict[str, Any]] = []
    for (container, parts), group in zip(held.items(), spec.groups, strict=True):
        length, filled = layout.lengths[container], layout.filled[container]
        state[container.key] = _entry(group.counters, parts, length, placeholders)
        masters.append(placeholders(Region("fp32", parts, filled)))
        paddings.append(length - filled)
        slices.append(
            OrderedDict((n, torch_pickle.FragmentAddress(s.length, s.offset)) for n, s in parts)
        )
    groups = [{**group.settings, "params": [key]} for key, group in enumerate(spec.groups)]
    return {
        "base_optimizer_state": {"state": state, "param_groups": groups},
        "single_partition_of_fp32_groups": masters,
        "zero_stage": torch_pickle.ZeroStage(topology.zero_stage),
        **_clip(spec),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group) for group in layout.groups],
        "partition_count": [topology.data_size] * len(layout.groups),
        "ds_version": spec.template.header["ds_version"],
        "param_slice_mappings": slices,
    }


def _by_subgroup(
    spec: CheckpointSpec, data_rank: int, placeholders: PlaceholderTensors
) -> dict[str, Any]:
    """ZeRO-3: one flat buffer for each sub-group."""
    layout = spec.layout
    group_of = [group for group, _ in layout.subgroups]
    state: dict[int, Any] = {}
    masters: list[Tensor] = []
    for container, parts in layout.buffers_of_rank(data_rank).items():
        length = layout.lengths[container]
        state[container.key] = _entry(
            spec.groups[group_of[container.key]].counters, parts, length, placeholders
        )
        masters.append(placeholders(Region("fp32", parts, length)))
    groups = [
        {**group.settings, "params": [key for key, g in enumerate(group_of) if g == number]}
        for number, group in enumerate(spec.groups)
    ]
    return {
        "zero_stage": torch_pickle.ZeroStage.weights,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
        "fp32_flat_groups": masters,
        "partition_count": spec.topology.data_size,
    }


def _clip(spec: CheckpointSpec) -> dict[str, float]:
    """The gradient clipping norm, which ZeRO 1 and 2 load from their checkpoint.

    If the template does not hold it, the entry is left out, and an engine keeps its own.
    """
    template, config = spec.template, spec.template.header.get("ds_config") or {}
    if template.topology.zero_stage in (1, 2):
        optimizer = template.optimizer_states(0, 0)["optimizer_state_dict"]
        return {key: optimizer[key] for key in ("clip_grad",) if key in optimizer}
    if not config:
        return {}
    return {"clip_grad": float(config.get("gradient_clipping") or 0.0)}
