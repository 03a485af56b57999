"""Growing a checkpoint into a DeepSpeed engine that a program has built itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lag_megatron.checkpoint.hf.plain_reader import has_names_of, open_under_own_names
from lag_megatron.checkpoint.open import HF, ZERO, detect, open_checkpoint, resolve_checkpoint
from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.compatibility import parameter_differences
from lag_megatron.checkpoint.state.layout import ParamGroup, make_layout
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.source import CheckpointSource
from lag_megatron.checkpoint.state.spec import DTYPES
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.checkpoint.zero.file_names import torch_optimizer_state
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.distributed.rank_errors import run_on_all_ranks
from lag_megatron.engine.deepspeed_adapter import (
    adapt,
    full_shape,
    optimizer_kind,
    place_of,
    require_adaptable,
)
from lag_megatron.engine.state import EngineState
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.plan import GrowthPlan

# Entries of a model file that DeepSpeed writes itself; all others are the program's.
_DEEPSPEED_ENTRIES = {
    *("module", "buffer_names", "shared_params", "optimizer", "lr_scheduler", "data_sampler"),
    *("param_shapes", "frozen_param_shapes", "frozen_param_fragments", "random_ltd", "num_experts"),
    *("global_steps", "global_samples", "skipped_steps", "sparse_tensor_module_names"),
    *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions"),
    *("ds_config", "ds_version"),
}


def grow_engine(
    engine: Any, checkpoint: str | Path, plan: GrowthPlan, *, allow_nonfinite: bool = False
) -> dict[str, Any]:
    """Overwrite an engine's state with what a plan makes of a checkpoint; a collective call.

    The same as growing the checkpoint on disk for this engine's ranks and ZeRO stage, and loading
    it with ``engine.load_checkpoint``, bit for bit; nothing is written.  Weights, moments, step
    counts, hyper-parameters, loss scale, buffers and the state of the learning-rate scheduler are
    taken.  A scheduler of which the checkpoint has no state stays as it is.

    Args:
        engine: what ``deepspeed.initialize`` returned for the grown model, with ZeRO 0 to 3 and
            Adam of torch or DeepSpeed.
        checkpoint: of any format and number of ranks: its directory, or one with a pointer file to
            it.  A transformers directory has weights alone: moments become 0, and the optimizer's
            settings stay as they are.  Its tensors have the names of the engine's parameters, or
            the engine is of Megatron-Core.
        plan: the growth; the operator ``identity`` reshards.
        allow_nonfinite: go on where values of the checkpoint are NaN or infinite.

    Returns:
        the program's own entries of the checkpoint (``client_state``), and under ``lag`` the
        growth history.

    Raises:
        LagError: on every rank, before anything is overwritten: if the engine's parameters,
            shapes, groups, precision or optimizer do not fit, or the checkpoint is damaged.
        CheckpointError: on every rank, if values of the checkpoint are not finite; the engine's
            state is then neither the old nor the new one.
    """
    live = _LiveEngine(engine)
    found: list[GrownState] = []  # too large to be sent to other ranks
    run_on_all_ranks(lambda: found.append(live.checked(Path(checkpoint), plan, allow_nonfinite)))
    (growth,) = found
    written = run_on_all_ranks(lambda: live.overwrite(growth))
    live.state.sync_weights(written=written[dist.get_rank()])
    header = growth.source.header
    if engine.lr_scheduler is not None and header.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(header["lr_scheduler"])
    entries = {key: value for key, value in header.items() if key not in _DEEPSPEED_ENTRIES}
    return {**entries, "lag": growth.client_state}


class _LiveEngine:
    """An initialized engine with what is known of its parameters and ranks.

    Raises:
        PlanError: if its state cannot be overwritten in place.
    """

    def __init__(self, engine: Any) -> None:
        topology, place = place_of(engine)
        require_adaptable(engine, topology)
        adapter = adapt(engine, zero_stage=topology.zero_stage, precision=topology.precision)
        self._adapter, self._topology, self._place = adapter, topology, place
        self._module = adapter.module
        self._groups = _parameter_groups(self._module, adapter.trained_parameters)
        kind = optimizer_kind(adapter.torch_optimizer)
        self.state = EngineState(
            adapter, make_layout(self._groups, topology, kind), topology, place
        )

    def checked(self, checkpoint: Path, plan: GrowthPlan, allow_nonfinite: bool) -> GrownState:
        """The grown state of a checkpoint, which fits this engine; nothing is overwritten yet."""
        _require_precision(self._module, self._topology.precision)
        source = _open(checkpoint, self._groups, self._module)
        growth = GrownState(source, plan, self._topology, allow_nonfinite)
        _require_same_model(growth, self._groups, self._module)
        self.state.require_compatible(growth)
        growth.source.check_every_file()
        growth.source.require_sound(VerifyScope(dist.get_rank(), dist.get_world_size()))
        return growth

    def overwrite(self, growth: GrownState) -> bool:
        """Overwrite this rank's part; returns whether its weights were overwritten too."""
        fill = growth.filler(tensor_rank=self._place["tensor_rank"])
        parameters = dict(self._module.named_parameters())
        names = list(growth.frozen.shapes)
        rank = self._place["data_rank"] if self._topology.zero_stage == 3 else 0
        for container, held in growth.frozen.buffers_of_rank(rank).items():
            region = Region("fp32", held, growth.frozen.lengths[container], trained=False)
            fill(region, self._adapter.untrained_weights(parameters[names[container.key]]))
        _copy_buffers(growth, self._module, self._place["tensor_rank"])
        return self.state.overwrite(growth)


def _parameter_groups(
    module: torch.nn.Module, trained: Sequence[Sequence[torch.nn.Parameter]]
) -> list[ParamGroup]:
    """Names and shapes of the trained parameters, by group, in flat order.

    Raises:
        PlanError: if the optimizer has a parameter that the model has not, or one that is frozen.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for parameter in (p for group in trained for p in group):
        if id(parameter) not in names or not parameter.requires_grad:
            what = f"the frozen parameter {names.get(id(parameter))}"
            foreign = f"a parameter of shape {full_shape(parameter)} that the model has not"
            raise PlanError(
                f"the engine's optimizer has {what if id(parameter) in names else foreign}. Give "
                "it the parameters of the model that are trained, and no others."
            )
    return [{names[id(p)]: full_shape(p) for p in group} for group in trained]


def _open(path: Path, groups: Sequence[ParamGroup], module: torch.nn.Module) -> CheckpointSource:
    """The checkpoint; in one of ZeRO-0 optimizer states are numbered in the engine's order."""
    path = resolve_checkpoint(path)
    kind = detect(path)
    if kind == HF and has_names_of(path, list(dict(module.named_parameters()))):
        return _open_transformers(path, groups, module)
    if kind != ZERO:
        return open_checkpoint(path)
    source = ZeroCheckpoint.open(path)
    lag = source.client_state
    if source.topology.zero_stage or "parameter_groups" in lag:
        return source
    listed = [[name for name in group if name in source.header["module"]] for group in groups]
    numbered = torch_optimizer_state(source.topology, source.header, None)["param_groups"]
    found, expected = [len(group["params"]) for group in numbered], [len(g) for g in listed]
    if found != expected:
        raise CheckpointError(
            f"{path}: the optimizer has groups of {found} parameters, but the engine's groups "
            f"have {expected} of the checkpoint's parameters. Build the engine with the groups "
            "that the checkpoint was trained with."
        )
    return replace(source, header={**source.header, "lag": {**lag, "parameter_groups": listed}})


def _open_transformers(
    path: Path, groups: Sequence[ParamGroup], module: torch.nn.Module
) -> CheckpointSource:
    """A directory whose tensors have the names of the engine's parameters."""
    owners = {id(p): name for name, p in module.named_parameters()}
    names = module.named_parameters(remove_duplicate=False)
    trained = {name for group in groups for name in group}
    return open_under_own_names(
        path,
        [list(group) for group in groups],
        [name for name in owners.values() if name not in trained],
        aliases={name: owners[id(p)] for name, p in names if owners[id(p)] != name},
        buffers=list(_buffers(module)),
    )


def _require_same_model(
    growth: GrownState, groups: Sequence[ParamGroup], module: torch.nn.Module
) -> None:
    """Compare trained and frozen parameters and buffers with those of the grown state."""
    trained = {name for group in groups for name in group}
    frozen = {
        name: shape
        for name, parameter in module.named_parameters()
        if name not in trained and numel(shape := full_shape(parameter))
    }
    grown = growth.frozen.shapes
    details = parameter_differences(growth.layout.groups, groups)
    details += [
        f"not trained: {line}"
        for line in parameter_differences([_sorted(grown)], [_sorted(frozen)])
    ]
    details += [f"missing: buffer {n}" for n in _buffers(module) if n not in growth.spec.names]
    if details:
        raise CheckpointError(
            f"{growth.source.path}: grows into another model than the engine's: "
            f"{'; '.join(details)}. Build the engine's model with {growth.plan.target_layers} "
            "layers, and its optimizer with the parameter groups of the checkpoint."
        )


def _sorted(shapes: ParamGroup) -> ParamGroup:
    return dict(sorted(shapes.items()))


def _require_precision(module: torch.nn.Module, precision: str) -> None:
    """Check that the weights are in the precision that the engine was configured for."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != DTYPES[precision]:
            raise PlanError(
                f"the engine is configured for {precision}, but {name} is {parameter.dtype}. "
                "Load the model in fp32 and let DeepSpeed cast it, or set bf16 or fp16 in its "
                "configuration."
            )


def _buffers(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The buffers that a checkpoint has."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def _copy_buffers(growth: GrownState, module: torch.nn.Module, tensor_rank: int) -> None:
    old = growth.source.topology.tensor_size
    source = growth.source.model_states(tensor_rank if tensor_rank < old else 0, 0)["module"]
    for name, buffer in _buffers(module).items():
        buffer.copy_(source[growth.spec.names[name]])
