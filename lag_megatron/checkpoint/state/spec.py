"""What is to be written as a checkpoint, and the room for its values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.layout import (
    DEFAULT_SUB_GROUP_SIZE,
    GroupState,
    Layout,
    Topology,
)
from lag_megatron.checkpoint.state.loss_scale import LossScale
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.source import CheckpointSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """A checkpoint to be written.

    Attributes:
        topology: how it will be spread.
        layout: of the parameters that are trained.
        frozen: layout of those that are not.
        template: where everything beside parameters and moments comes from.
        names: every key of the new module, with the template's key in whose place it stands.
        aliases: further names of parameters used twice, with the name of the owner.
        entries: what replaces entries of the template's model file.
        groups: what the optimizer keeps for each parameter group.
        loss_scale: what gradients are multiplied by.
    """

    topology: Topology
    layout: Layout
    frozen: Layout
    template: CheckpointSource
    names: Mapping[str, str]
    aliases: Mapping[str, str]
    entries: Mapping[str, Any]
    groups: Sequence[GroupState]
    loss_scale: LossScale


class PlaceholderTensors:
    """Makes the tensors that will be filled, and knows them from those to be taken over."""

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self._tensors: list[Tensor] = []  # kept, so that no other tensor gets their identity

    def __call__(
        self, region: Region, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Room for a region; never touched, it costs address space and no memory."""
        tensor = torch.empty((region.length,) if shape is None else tuple(shape), dtype=dtype)
        self.regions[id(tensor)] = region
        self._tensors.append(tensor)
        return tensor


def ds_config_of(draft: CheckpointSpec) -> dict[str, Any]:
    """DeepSpeed's configuration with the stage and the precision of the new checkpoint."""
    config = dict(draft.template.header.get("ds_config") or {})
    zero = {**(config.get("zero_optimization") or {}), "stage": draft.topology.zero_stage}
    size = draft.topology.sub_group_size
    if int(zero.get("sub_group_size") or DEFAULT_SUB_GROUP_SIZE) != size:
        zero["sub_group_size"] = size  # the layout was cut by it
    config["zero_optimization"] = zero
    for precision in ("bf16", "fp16"):
        enabled = draft.topology.precision == precision
        if enabled or (config.get(precision) or {}).get("enabled"):
            config[precision] = {**(config.get(precision) or {}), "enabled": enabled}
    return config
