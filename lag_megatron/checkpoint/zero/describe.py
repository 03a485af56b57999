"""Facts about a ZeRO checkpoint, as plain values."""

from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.families.describe_layers import describe_layers
from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.source import unsharded_shapes
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.file_names import torch_optimizer_state
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config.schema.param_names import ParamNames


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a directory holds a manifest or shards, complete or not."""
    return manifest.is_committed(path) or any(path.glob("*_states.pt"))


def describe_zero(path: Path, names: ParamNames | None = None) -> dict[str, Any]:
    """Facts about a tag directory; every file's header is checked, no tensor is read.

    Raises:
        CheckpointError: if it is incomplete, damaged or mixed.
    """
    checkpoint = ZeroCheckpoint.open(path)
    topology, state = checkpoint.topology, checkpoint.client_state
    checkpoint.check_every_file()
    shapes = unsharded_shapes(checkpoint)
    files = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}
    return {
        "path": str(path),
        "format": f"DeepSpeed {checkpoint.header['ds_version']}, ZeRO-{topology.zero_stage}",
        "committed": manifest.is_committed(path),
        "step": checkpoint.step,
        "tokens": state.get("tokens"),
        "topology": {
            "zero_stage": topology.zero_stage,
            "data_parallel": topology.data_size,
            "tensor_parallel": topology.tensor_size,
            "precision": topology.precision,
        },
        "parameters": sum(numel(shapes[name]) for name in checkpoint.layout.shapes),
        **describe_layers(shapes, names),
        "optimizer": _optimizer(checkpoint),
        "optimizer_states": list(checkpoint.layout.states),
        "growth_history": list(state.get("growth_history", [])),
        "files": files,
        "bytes": sum(files.values()),
    }


def _optimizer(checkpoint: ZeroCheckpoint) -> list[dict[str, Any]]:
    """Hyper-parameters of each parameter group, with the number of its tensors."""
    zero_stage = checkpoint.topology.zero_stage
    states = checkpoint.optimizer_states(0, 0) if zero_stage else None
    inner = torch_optimizer_state(checkpoint.topology, checkpoint.header, states)
    plain = (bool, int, float, str, list, tuple, type(None))
    return [
        {
            "tensors": len(members),
            **{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)},
        }
        for group, members in zip(inner["param_groups"], checkpoint.groups, strict=True)
    ]
