"""The optimizer's objects in DeepSpeed's forms, with room where masters and moments will go.

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
    draft: CheckpointSpec, *, data_rank: int, room: PlaceholderTensors
) -> dict[str, Any]:
    """The objects of a rank's optimizer file (ZeRO 1 to 3)."""
    template, topology = draft.template, draft.topology
    old: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    if template.topology.zero_stage:
        old = template.optimizer_states(0, 0)
        if _keeps_form(draft):
            optimizer = dict(old["optimizer_state_dict"])
    optimizer |= {
        "loss_scaler": draft.loss_scale.as_object(),
        "dynamic_loss_scale": draft.loss_scale.dynamic,
        "overflow": False,
    }
    build = _by_subgroup if topology.zero_stage == 3 else _by_group
    optimizer |= build(draft, data_rank, room)
    version = draft.template.header["ds_version"]
    return {"ds_version": version, **old, "ds_config": ds_config_of(draft),
            "optimizer_state_dict": optimizer}  # fmt: skip


def unpartitioned_optimizer(draft: CheckpointSpec, room: PlaceholderTensors) -> dict[str, Any]:
    """The optimizer's state as a ZeRO-0 model file keeps it: by number of the parameter."""
    layout, numbers = draft.layout, iter(range(len(draft.layout.shapes)))
    segments = list(layout.segments.items())
    moments = [item for item in layout.states.items() if item[0] != "fp32"]
    groups: list[dict[str, Any]] = []
    masters: list[list[Tensor]] = []
    state: dict[int, Any] = {}
    for number, group in enumerate(layout.groups):
        members = [next(numbers) for _ in group]
        groups.append({**draft.groups[number].settings, "params": members})
        masters.append([])
        for key, shape in zip(members, group.values(), strict=True):
            name, (segment,) = segments[key]
            held = ((name, segment),)
            state[key] = _counters(draft.groups[number].counters) | {
                moment: room(Region(moment, *_run(there, name)), there.shapes[name])
                for moment, there in moments
                if name in there.shapes
            }
            if draft.topology.precision != "fp32":
                masters[-1].append(room(Region("fp32", held, segment.length), shape))
    grown = {"state": state, "param_groups": groups}
    if draft.topology.precision == "fp32":
        return grown
    return {
        **draft.loss_scale.as_entries(),
        "optimizer_state_dict": grown,
        "fp32_groups": masters,
    }


def _keeps_form(draft: CheckpointSpec) -> bool:
    """Whether the template's optimizer is of the same class: ZeRO 1 and 2 share one."""
    forms = {draft.template.topology.zero_stage == 3, draft.topology.zero_stage == 3}
    return len(forms) == 1


def _entry(
    counters: Mapping[str, Any],
    held: Sequence[tuple[str, Segment]],
    length: int,
    room: PlaceholderTensors,
) -> dict[str, Any]:
    moments = {m: room(Region(m, tuple(held), length)) for m in STATES if m != "fp32"}
    return _counters(counters) | moments


def _counters(counters: Mapping[str, Any]) -> dict[str, Any]:
    # Cloned: entries that shared one step counter would each advance it for all.
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in counters.items()}


def _run(layout: Layout, name: str) -> tuple[tuple[tuple[str, Segment]], int]:
    """A whole parameter's elements of a state, and how many they are."""
    (segment,) = layout.segments[name]
    return ((name, segment),), segment.length


def _by_group(draft: CheckpointSpec, data_rank: int, room: PlaceholderTensors) -> dict[str, Any]:
    """ZeRO 1 and 2: one buffer for each parameter group."""
    topology, layout = draft.topology, draft.layout
    held = layout.held(data_rank)
    state: dict[int, Any] = {}
    masters: list[Tensor] = []
    paddings: list[int] = []
    slices: list[OrderedDict[str, Any]] = []
    for (container, parts), group in zip(held.items(), draft.groups, strict=True):
        length, filled = layout.lengths[container], layout.filled[container]
        state[container.key] = _entry(group.counters, parts, length, room)
        masters.append(room(Region("fp32", parts, filled)))
        paddings.append(length - filled)
        slices.append(
            OrderedDict((n, torch_pickle.FragmentAddress(s.length, s.offset)) for n, s in parts)
        )
    groups = [{**group.settings, "params": [key]} for key, group in enumerate(draft.groups)]
    return {
        "base_optimizer_state": {"state": state, "param_groups": groups},
        "single_partition_of_fp32_groups": masters,
        "zero_stage": torch_pickle.ZeroStage(topology.zero_stage),
        **_clip(draft),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group) for group in layout.groups],
        "partition_count": [topology.data_size] * len(layout.groups),
        "ds_version": draft.template.header["ds_version"],
        "param_slice_mappings": slices,
    }


def _by_subgroup(draft: CheckpointSpec, data_rank: int, room: PlaceholderTensors) -> dict[str, Any]:
    """ZeRO-3: buffers filled with parts of parameters up to a size."""
    layout = draft.layout
    group_of = [group for group, _ in layout.subgroups]
    state: dict[int, Any] = {}
    masters: list[Tensor] = []
    for container, parts in layout.held(data_rank).items():
        length = layout.lengths[container]
        state[container.key] = _entry(
            draft.groups[group_of[container.key]].counters, parts, length, room
        )
        masters.append(room(Region("fp32", parts, length)))
    groups = [
        {**group.settings, "params": [key for key, g in enumerate(group_of) if g == number]}
        for number, group in enumerate(draft.groups)
    ]
    return {
        "zero_stage": torch_pickle.ZeroStage.weights,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
        "fp32_flat_groups": masters,
        "partition_count": draft.topology.data_size,
    }


def _clip(draft: CheckpointSpec) -> dict[str, float]:
    """The bound of the gradient norm, which ZeRO 1 and 2 take from their checkpoint.

    Where nothing says what it was, the entry is left out, and an engine keeps its own.
    """
    template, config = draft.template, draft.template.header.get("ds_config") or {}
    if template.topology.zero_stage in (1, 2):
        optimizer = template.optimizer_states(0, 0)["optimizer_state_dict"]
        return {key: optimizer[key] for key in ("clip_grad",) if key in optimizer}
    if not config:
        return {}
    return {"clip_grad": float(config.get("gradient_clipping") or 0.0)}
