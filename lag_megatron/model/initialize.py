"""First weights: Megatron-Core's distributions, drawn by position, so no topology changes them."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from lag_megatron.checkpoint.families.roles import megatron_role
from lag_megatron.checkpoint.state.tensor_parallel import cut_dim, shard_boxes, unsharded_shape
from lag_megatron.config import RunConfig
from lag_megatron.distributed.world import World
from lag_megatron.growth.weight_init import fill, initial_weights


def mark_cut_parameters(model: torch.nn.Module) -> None:
    """Mark parameters that tensor parallelism cuts, as Megatron marks what it draws itself.

    Without the mark gradient norms count the parts of a parameter as replicas of one.
    """
    for name, parameter in model.named_parameters():
        dim = cut_dim(name)
        if dim is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


@torch.no_grad()
def initialize_weights(
    model: torch.nn.Module,
    config: RunConfig,
    world: World,
    *,
    num_layers: int,
    gathered: Callable[[torch.nn.Parameter], AbstractContextManager[object]],
) -> None:
    """Draw every weight of a model from (seed, name, position).

    Args:
        model: as ``build_gpt`` made it.
        config: gives the seed and the standard deviation.
        world: gives this rank's part of cut parameters.
        num_layers: depth that scales the projections into the residual stream.
        gathered: makes one parameter whole for the time of writing (ZeRO-3).
    """
    for name, parameter in model.named_parameters():
        role = megatron_role(name)
        assert role is not None, f"{name}: in no table of Megatron-Core's names"
        with gathered(parameter):
            shape = unsharded_shape(name, tuple(parameter.shape), tensor_size=world.tensor_size)
            fresh = initial_weights(
                role,
                name,
                shape,
                num_layers=num_layers,
                init_std=config.model.init_std,
                key=f"init/{config.seed}",
            )
            assert fresh is not None, f"{name}: has no initial weights of its own"
            for piece in shard_boxes(
                name,
                shape,
                tensor_rank=world.tensor_rank,
                tensor_size=world.tensor_size,
                gated=config.model.activation == "swiglu",
            ):
                extent = zip(piece.local, piece.box.shape, strict=True)
                part = parameter[tuple(slice(low, low + size) for low, size in extent)]
                fill(part, fresh, shape=shape, box=piece.box)
