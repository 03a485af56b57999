"""Default DeepSpeed entries and AdamW settings, for formats that hold weights alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.layout import GroupState, ParamGroup
from lag_megatron.config import ModelConfig

# The version whose files are written here.
DEEPSPEED = "0.19.8"
_EXTRA = "_extra_state"
SETTINGS_NOTE = (
    "the optimizer's settings are torch's defaults (learning rate 0.001, decay 0.01), which "
    "DeepSpeed's load_checkpoint takes over unless load_optimizer_states=False"
)


def default_header(
    module: Sequence[str], *, client_state: Mapping[str, Any], step: int
) -> dict[str, Any]:
    """The entries of a DeepSpeed model file, without weights.

    Args:
        module: keys of the module's state.
        client_state: the entries of this program's trainer.
        step: optimizer steps taken.
    """
    return {
        "module": dict.fromkeys(module),
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {},
        "ds_version": DEEPSPEED,
        "lag": dict(client_state),
    }


def default_client_state(
    model: ModelConfig, groups: Sequence[ParamGroup], *, step: int = 0, tokens: int = 0
) -> dict[str, Any]:
    """The client state of this program's trainer for a model of this shape."""
    return {
        "step": step,
        "tokens": tokens,
        "model": asdict(model),
        "num_layers": model.num_layers,
        "parameter_groups": [list(group) for group in groups],
        "growth_history": [],
    }


def default_group_states(groups: Sequence[ParamGroup], *, step: int = 0) -> list[GroupState]:
    """The initial settings of torch's AdamW by parameter group; vectors have no weight decay."""
    (settings,) = torch.optim.AdamW([torch.zeros(1)]).param_groups
    known = {key: value for key, value in settings.items() if key != "params"}
    return [
        GroupState(
            known if _decays(group) else {**known, "weight_decay": 0.0},
            {"step": torch.tensor(float(step))},
        )
        for group in groups
    ]


def decay_groups(shapes: Mapping[str, Shape]) -> list[ParamGroup]:
    """Matrices, then vectors, as this program's trainer groups them; empty groups are left out."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    vectors = {name: shape for name, shape in shapes.items() if len(shape) <= 1}
    return [group for group in (matrices, vectors) if group]


def module_keys(names: Sequence[str]) -> list[str]:
    """Keys of a Megatron-Core module's state with these parameters, in order.

    Each parallel linear layer has an empty ``_extra_state`` entry after its parameters; so has the
    output layer, even without a parameter.

    Args:
        names: parameters in the order of the model.
    """
    return list(_with_extra_state(names))


def _with_extra_state(names: Sequence[str]) -> Iterator[str]:
    has_output = False
    for name, after in zip(names, [*names[1:], ""], strict=True):
        yield name
        owner = name.rpartition(".")[0]
        kind = owner.rpartition(".")[2]
        has_output = has_output or kind == "output_layer"
        if (kind.startswith("linear_") or kind == "output_layer") and not after.startswith(owner):
            yield f"{owner}.{_EXTRA}"
    if not has_output:
        yield f"output_layer.{_EXTRA}"


def _decays(group: ParamGroup) -> bool:
    return any(len(shape) > 1 for shape in group.values())
