"""The first model file of a ZeRO checkpoint: topology, parameter groups, shared and frozen ones."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.layout import DEFAULT_SUB_GROUP_SIZE, ParamGroup, Topology
from lag_megatron.checkpoint.zero.load import FOREIGN, load_states
from lag_megatron.errors import CheckpointError
from lag_megatron.small_files import read_pointer

# Options of DeepSpeed that change the order or padding of flat buffers in ways not handled here.
_UNKNOWN_ORDERS = ("round_robin_gradients", "parameter_alignment")
_FIRST_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def resolve_tag(path: Path) -> Path:
    """The tag directory: ``path`` itself, or the one that its file ``latest`` names.

    Raises:
        CheckpointError: if it does not exist.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory.")
    latest = path / "latest"
    if not latest.is_file():
        return path
    tag = read_pointer(latest, error=CheckpointError)
    if not (path / tag).is_dir():
        raise CheckpointError(
            f"{latest}: names the tag {tag!r}, but {path / tag} does not exist. "
            f"Tags there: {', '.join(sorted(p.name for p in path.iterdir() if p.is_dir()))}."
        )
    return path / tag


def read_header(path: Path) -> tuple[Mapping[str, Any], Topology]:
    """The objects of a tag directory's first model file, and the topology.

    Raises:
        CheckpointError: if it is not a DeepSpeed checkpoint, or one that is not supported.
    """
    for name in _FIRST_FILES:
        if (path / name).is_file():
            header = load_states(path / name)
            try:
                return header, _topology(path, header, name)
            except KeyError as error:
                raise CheckpointError(f"{path / name}: has no entry {error}: {FOREIGN}") from None
    raise CheckpointError(
        f"{path}: not a DeepSpeed checkpoint: neither {' nor '.join(_FIRST_FILES)} is there. "
        "Give a tag directory, or a directory with a file `latest`."
    )


def _topology(path: Path, header: Mapping[str, Any], name: str) -> Topology:
    config = header.get("ds_config") or {}
    zero = config.get("zero_optimization") or {}
    for option in _UNKNOWN_ORDERS:
        if zero.get(option):
            raise CheckpointError(
                f"{path}: written with zero_optimization.{option}, which orders flat buffers in a "
                "way that is not understood here. Save it without that option."
            )
    dimensions = header.get("checkpoint_parallel_dimensions") or {}
    if dimensions.get("pp_degree", 1) != 1:
        raise CheckpointError(f"{path}: pipeline-parallel checkpoints are not understood here.")
    enabled = [p for p in ("bf16", "fp16") if (config.get(p) or {}).get("enabled")]
    return Topology(
        zero_stage=3 if name.startswith("zero_pp") else int(zero.get("stage", 0)),
        data_size=int(header["dp_world_size"]),
        tensor_size=int(header["mp_world_size"]),
        precision=enabled[0] if enabled else "fp32",  # type: ignore[arg-type]
        sub_group_size=int(zero.get("sub_group_size") or DEFAULT_SUB_GROUP_SIZE),
    )


def trained_groups(path: Path, header: Mapping[str, Any]) -> list[ParamGroup]:
    """Names and shapes of the optimizer's parameters by group, from one model file.

    Raises:
        CheckpointError: if the file does not list its parameters in their order.
    """
    if header.get("param_shapes") is not None:
        return [{n: tuple(shape) for n, shape in g.items()} for g in header["param_shapes"]]
    listed = (header.get("lag") or {}).get("parameter_groups")
    if listed is None:
        raise CheckpointError(
            f"{path}: a ZeRO-0 checkpoint keeps its optimizer state by number, and this one does "
            "not say which parameter has which. Resume it under ZeRO-1, save, and use that."
        )
    module = header["module"]
    return [{name: tuple(module[name].shape) for name in group} for group in listed]


def join_subgroups(listed: list[ParamGroup], states: Any) -> list[ParamGroup]:
    """Parameter groups from ZeRO-3's list of shapes, which is by sub-group."""
    groups: list[ParamGroup] = []
    inner = states["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
    for group in inner:
        members: dict[str, Shape] = {}
        for key in group["params"]:
            members |= listed[key]
        groups.append(members)
    return groups


def require_listed_once(path: Path, groups: Iterable[Iterable[str]]) -> None:
    """Check that no parameter is in two groups, of which each would have values for it.

    Raises:
        CheckpointError: naming the first that is.
    """
    found: set[str] = set()
    for name in (name for group in groups for name in group):
        if name in found:
            raise CheckpointError(
                f"{path}: its model file lists the parameter {name} twice, so it is damaged or "
                "two were mixed. Restore it from a copy, or use another tag."
            )
        found.add(name)


def aliases(header: Mapping[str, Any]) -> dict[str, str]:
    """Further names of shared parameters, with the name that owns the values.

    DeepSpeed lists them in the first rank's file under ZeRO; elsewhere two names that share a
    storage are taken for one parameter.
    """
    listed = dict(header.get("shared_params") or {})
    owners: dict[tuple[int, int], str] = {}
    for name, tensor in header["module"].items():
        if isinstance(tensor, Tensor) and tensor.numel():
            place = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()))
            owner = owners.setdefault(place, name)
            if owner != name:
                listed.setdefault(name, owner)
    return listed


def frozen_shapes(header: Mapping[str, Any], trained: Mapping[str, Shape]) -> ParamGroup:
    """Names and shapes of parameters that the optimizer does not train.

    ZeRO 2 and 3 list them.  For lower stages they are the tensors of the module that are neither
    trained, nor buffers, nor further names of shared parameters.
    """
    listed = header.get("frozen_param_shapes")
    if listed is not None:
        shapes = {name: tuple(shape) for name, shape in listed.items()}
    else:
        known = {*trained, *(header.get("buffer_names") or ()), *aliases(header)}
        shapes = {
            name: tuple(value.shape)
            for name, value in header["module"].items()
            if isinstance(value, Tensor) and name not in known
        }
    return {name: shape for name, shape in shapes.items() if numel(shape)}
