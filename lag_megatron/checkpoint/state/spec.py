"""The specification of a checkpoint to write, and placeholders for its values."""

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
    """Everything about a checkpoint to write except its values.

    Attributes:
        topology: how it will be sharded.
        layout: of the trained parameters.
        frozen: layout of the parameters that are not trained.
        template: the checkpoint from which counters and other entries are taken.
        names: every key of the new module, with the template's key that it continues.
        aliases: further names of shared parameters, with the name that owns the values.
        entries: replacements for entries of the template's model file.
        groups: the optimizer's settings and counters by parameter group.
        loss_scale: the loss scaling.
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
    """Creates tensors whose values are made later, and tells them from tensors to copy.

    Attributes:
        regions: the region of each placeholder, by the ``id`` of its tensor.
    """

    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}
        self._tensors: list[Tensor] = []  # kept alive, so that no other tensor gets the same id

    def __call__(
        self, region: Region, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A placeholder for a region; it is never touched, so it takes no memory."""
        tensor = torch.empty((region.length,) if shape is None else tuple(shape), dtype=dtype)
        self.regions[id(tensor)] = region
        self._tensors.append(tensor)
        return tensor


def ds_config_of(spec: CheckpointSpec) -> dict[str, Any]:
    """The template's DeepSpeed configuration with the stage and precision of the new checkpoint."""
    config = dict(spec.template.header.get("ds_config") or {})
    zero = {**(config.get("zero_optimization") or {}), "stage": spec.topology.zero_stage}
    size = spec.topology.sub_group_size
    if int(zero.get("sub_group_size") or DEFAULT_SUB_GROUP_SIZE) != size:
        zero["sub_group_size"] = size  # the layout was cut by it
    config["zero_optimization"] = zero
    for precision in ("bf16", "fp16"):
        enabled = spec.topology.precision == precision
        if enabled or (config.get(precision) or {}).get("enabled"):
            config[precision] = {**(config.get(precision) or {}), "enabled": enabled}
    return config
