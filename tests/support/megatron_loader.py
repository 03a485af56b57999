"""Megatron-Core's own load of a checkpoint: ``from megatron_loader import load_dist``."""

import torch
from conftest import PICO_VOCABULARY


def load_dist(config, folder, numbered=False, vocab_size=PICO_VOCABULARY):
    """Megatron-Core's own load on each tensor-parallel rank: weights and optimizer states."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import optimizer as shards

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    start_world(tensor=config.parallel.tensor)
    model = build_model(
        config.model, config.parallel, num_layers=config.model.num_layers,
        vocab_size=vocab_size,
    )  # fmt: skip
    sharded = model.sharded_state_dict(
        metadata={"non_homogeneous_layers": True} if numbered else None
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    for number, parameter in enumerate(model.parameters()):
        state["state"][number]["param"] = torch.zeros_like(parameter)
    ids = shards.get_param_id_to_sharded_param_map(sharded, model.parameters())
    shards.optim_state_to_sharding_state(state, ids, exclude_keys=("step",))
    loaded = dist_checkpointing.load({"model": sharded, "optimizer": state}, str(folder))
    found = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        kept = loaded["optimizer"]["state"][number]
        found["weight", name] = loaded["model"][name].detach().clone()
        found["fp32", name] = kept["param"]
        found["exp_avg", name], found["exp_avg_sq", name] = kept["exp_avg"], kept["exp_avg_sq"]
        assert found["weight", name].shape == parameter.shape
    stop_world()
    return found, loaded["iteration"], loaded["optimizer"]["param_state_sharding_type"]
