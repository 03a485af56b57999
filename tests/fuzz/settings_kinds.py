"""Files that a user writes: configurations, plans, hostfiles, names of parameters."""

import dataclasses
import json
from pathlib import Path

from configuring import BASE, write
from kind import Kind

from lag_megatron.config import load_config
from lag_megatron.config.deepspeed import deepspeed_config, read_deepspeed_json
from lag_megatron.config.schema.param_names import read_param_names
from lag_megatron.distributed.hostfile import count_slots
from lag_megatron.growth.plan import GrowthPlan

_USERS = "they are the user's to choose"
_HOSTS = "# hosts of the queue\nuser@alpha slots=8\nbeta slots=4 # borrowed\n"
_NAMES = 'roles: {"*.ln_?.weight": norm_weight, "*.c_proj.weight": branch_output}\n'
_DEEPSPEED = {
    "train_batch_size": "auto",
    "zero_optimization": {"stage": 1, "overlap_comm": True},
    "bf16": {"enabled": False},
    "wall_clock_breakdown": False,
}
_TREE = {
    **BASE,
    "optimizer": {"lr": 3e-3, "schedule": {"warmup_steps": 4}},
    "growth": {"rule": "halving", "lag": 20, "rungs": [5, 20], "pool": {"operator": "lag"}},
    "parallel": {"zero_stage": 1, "micro_batch": 1, "global_batch": 4},
    "deepspeed": {"zero_optimization": {"overlap_comm": True}},
    "checkpoint": {"interval": 4},
    "tracking": {"wandb": {"mode": "disabled"}},
}


def _build(folder: Path) -> None:
    write(folder / "base.yaml", {"model": {**BASE["model"], "dropout": 0.1}})
    write(folder / "config.yaml", {"extends": "base.yaml", **_TREE})
    plan = GrowthPlan(operator="lag", options={"index": 1, "block_size": 1, "init": "duplicate"},
                      source_layers=2, target_layers=3)  # fmt: skip
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "hostfile").write_text(_HOSTS)
    (folder / "names.yaml").write_text(_NAMES + 'layers: "transformer.h.{}"\n')
    (folder / "deepspeed.json").write_text(json.dumps(_DEEPSPEED))


def _deepspeed(folder: Path) -> object:
    config = load_config(folder / "config.yaml")
    values = read_deepspeed_json(folder / "deepspeed.json")
    return deepspeed_config(dataclasses.replace(config, deepspeed=values), world_size=2)


def _kind(name: str, module: str, file: str, form: str, read, **options) -> Kind:
    return Kind(
        name=name,
        modules=(module,),
        build=_build,
        file=file,
        form=form,
        read=read,
        values_are_free=_USERS,
        bytes_are_free=_USERS,
        **options,
    )


KINDS = [
    _kind("configuration", "config.load", "config.yaml", "yaml",
          lambda folder: load_config(folder / "config.yaml")),
    _kind("configuration: extended", "config.load", "base.yaml", "yaml",
          lambda folder: load_config(folder / "config.yaml"), names=("config.yaml",)),
    _kind("growth plan", "growth.plan", "plan.json", "json",
          lambda folder: GrowthPlan.read(folder / "plan.json").layer_map),
    _kind("hostfile", "distributed.hostfile", "hostfile", "text",
          lambda folder: count_slots(folder / "hostfile")),
    _kind("names of parameters", "config.schema.param_names", "names.yaml", "yaml",
          lambda folder: read_param_names(folder / "names.yaml")),
    _kind("configuration of DeepSpeed", "config.deepspeed", "deepspeed.json", "json", _deepspeed,
          names=("DeepSpeed configuration",)),
]  # fmt: skip
