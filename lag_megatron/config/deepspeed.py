"""DeepSpeed's configuration from a run's: "auto" is filled in, contradictions are errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lag_megatron.config.schema.parallel import data_parallel_size
from lag_megatron.config.schema.run import RunConfig
from lag_megatron.errors import ConfigError
from lag_megatron.small_files import read_json

AUTO = "auto"
_UNREADABLE = (
    "round_robin_gradients",
    "parameter_alignment",
    "elastic_checkpoint",
    "offload_optimizer",
    "offload_param",
)


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration file.

    Raises:
        ConfigError: if it is missing or not a JSON object.
    """
    values: dict[str, Any] = read_json(
        Path(path), what="a configuration of DeepSpeed", error=ConfigError
    )
    return values


def deepspeed_config(config: RunConfig, *, world_size: int) -> dict[str, Any]:
    """The complete dictionary for ``deepspeed.initialize``.

    Values of ``config.deepspeed`` may be "auto" or equal to those that follow from the run's
    configuration; options without a counterpart there are passed on.

    Raises:
        ConfigError: naming every value that contradicts the run's configuration.
    """
    parallel = config.parallel
    replicas = data_parallel_size(parallel, world_size=world_size)
    ours: dict[str, Any] = {
        "train_batch_size": parallel.global_batch,
        "train_micro_batch_size_per_gpu": parallel.micro_batch,
        "gradient_accumulation_steps": parallel.global_batch // (parallel.micro_batch * replicas),
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": {"stage": parallel.zero_stage},
        "bf16": {"enabled": parallel.precision == "bf16"},
        "fp16": {"enabled": False},
    }
    if problems := _contradictions(ours, config.deepspeed, "deepspeed"):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  {p}" for p in problems)
        raise ConfigError(f"{count} in the DeepSpeed configuration\n{lines}")
    defaults: dict[str, Any] = {"steps_per_print": 10**9, "zero_allow_untested_optimizer": True}
    # From the third step on they wait for the device in every forward pass, for numbers that are
    # not printed.
    defaults["timers"] = {"throughput": {"enabled": False}}
    if parallel.precision == "bf16":
        # Summing many replicas' gradients in bf16 would make the curve depend on their number.
        defaults["communication_data_type"] = "fp32"
    return {**defaults, **_filled(ours, config.deepspeed)}


def _contradictions(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> list[str]:
    problems: list[str] = []
    for section in ("optimizer", "scheduler"):
        if path == "deepspeed" and section in theirs:
            problems.append(
                f"deepspeed.{section}: the optimizer and its schedule are configured under "
                "`optimizer:`. Remove the section."
            )
    if path == "deepspeed":
        problems += _refused(theirs)
    for key, value in theirs.items():
        if key not in ours or value == AUTO:
            continue
        if isinstance(ours[key], dict):
            if isinstance(value, Mapping):
                problems += _contradictions(ours[key], value, f"{path}.{key}")
            else:
                problems.append(f"{path}.{key}: expected a mapping (got {value!r}).")
        elif value != ours[key]:
            problems.append(
                f"{path}.{key}: {value!r} contradicts {ours[key]!r}, which follows from the "
                'configuration. Write "auto" or make them equal.'
            )
    return problems


def _refused(theirs: Mapping[str, Any]) -> list[str]:
    """Options whose checkpoints could not be grown: reported before training, not after it."""
    zero = theirs.get("zero_optimization") or {}
    problems = [
        f"deepspeed.zero_optimization.{option}: orders or stores shards in a way that cannot be "
        "grown here. Remove it."
        for option in _UNREADABLE
        if isinstance(zero, Mapping) and zero.get(option) not in (None, False)
    ]
    if (theirs.get("data_types") or {}).get("grad_accum_dtype") not in (None, AUTO, "bf16"):
        problems.append(
            "deepspeed.data_types.grad_accum_dtype: changes the optimizer's checkpoint format to "
            "one that cannot be grown here. Remove it."
        )
    return problems


def _filled(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(theirs)
    for key, value in ours.items():
        if isinstance(value, dict):
            result[key] = _filled(value, result.get(key) or {})
        else:
            result[key] = value
    return result
