"""DeepSpeed's ZeRO checkpoints, stages 0 to 3, read shard by shard.

The layout is derived from the parameter shapes that the checkpoint names, and checked against the
lengths of the buffers that it holds: a wrong order would load without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint import pickles
from lag_megatron.checkpoint.boxes import Shape, numel
from lag_megatron.checkpoint.layout import Container, Group, Layout, State, Topology, make_layout
from lag_megatron.errors import CheckpointError

# Options of DeepSpeed that change the order or padding of flat buffers in ways not handled here.
_UNKNOWN_ORDERS = ("round_robin_gradients", "parameter_alignment")


def model_file(topology: Topology, *, tensor_rank: int, data_rank: int) -> str:
    """Name of the file with a rank's weights and counters."""
    if topology.zero_stage == 3:
        return f"zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_model_states.pt"
    return f"mp_rank_{tensor_rank:02d}_model_states.pt"


def optimizer_file(topology: Topology, *, tensor_rank: int, data_rank: int) -> str | None:
    """Name of the file with a rank's optimizer shard; None where the model file holds it."""
    if topology.zero_stage == 0:
        return None
    prefix = "bf16_" if topology.precision == "bf16" else ""
    return f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"


def files_of(topology: Topology) -> list[str]:
    """Names of all files of a checkpoint."""
    names: dict[str, None] = {}
    for tensor_rank in range(topology.tensor_size):
        for data_rank in range(topology.data_size):
            names[model_file(topology, tensor_rank=tensor_rank, data_rank=data_rank)] = None
            name = optimizer_file(topology, tensor_rank=tensor_rank, data_rank=data_rank)
            if name:
                names[name] = None
    return list(names)


def resolve(path: Path) -> Path:
    """The tag directory: ``path`` itself, or the one that its ``latest`` names.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory.")
    latest = path / "latest"
    if not latest.is_file():
        return path
    tag = latest.read_text().strip()
    if not (path / tag).is_dir():
        raise CheckpointError(
            f"{latest}: names the tag {tag!r}, but {path / tag} does not exist. "
            f"Tags there: {', '.join(sorted(p.name for p in path.iterdir() if p.is_dir()))}."
        )
    return path / tag


@dataclass(frozen=True)
class ZeroCheckpoint:
    """A checkpoint that was opened and understood, but whose tensors are still on disk.

    Attributes:
        path: the tag directory.
        topology: how it is spread.
        header: the model file of tensor rank 0, data rank 0.
    """

    path: Path
    topology: Topology
    header: Mapping[str, Any] = field(repr=False)

    @staticmethod
    def open(path: Path) -> "ZeroCheckpoint":
        """Read a tag directory's header and check that all its files are there.

        Raises:
            CheckpointError: if it is not a DeepSpeed checkpoint, incomplete, or laid out by
                options that are not understood.
        """
        header, name = _first_header(path)
        topology = _topology(path, header, name)
        missing = [f for f in files_of(topology) if not (path / f).is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files_of(topology))} files are missing "
                f"({', '.join(missing[:3])}). Restore them, or use another tag."
            )
        return ZeroCheckpoint(path, topology, header)

    @property
    def client_state(self) -> dict[str, Any]:
        """What our trainer stored beside DeepSpeed's own entries; empty for others' files."""
        return dict(self.header.get("lag") or {})

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.header["global_steps"])

    @cached_property
    def groups(self) -> list[Group]:
        """Names and one tensor rank's shapes by parameter group, in flat order."""
        return self.parameter_groups(0)

    @cached_property
    def layout(self) -> Layout:
        """Where everything lies."""
        return make_layout(self.groups, self.topology)

    def parameter_groups(self, tensor_rank: int) -> list[Group]:
        """Names and shapes as one tensor rank's file gives them.

        Raises:
            CheckpointError: if the file does not say in which order its parameters lie.
        """
        header = self.model_states(tensor_rank, 0)
        if self.topology.zero_stage == 0:
            return _unpartitioned_groups(self.path, header)
        listed = [{n: tuple(shape) for n, shape in g.items()} for g in header["param_shapes"]]
        if self.topology.zero_stage != 3:
            return listed
        return _join_subgroups(listed, self._optimizer_states(tensor_rank, 0))

    def model_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of a model file."""
        stage3 = self.topology.zero_stage == 3
        name = model_file(
            self.topology, tensor_rank=tensor_rank, data_rank=data_rank if stage3 else 0
        )
        return self._file(name)

    def optimizer_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of an optimizer file, its buffers checked against the layout."""
        states = self._optimizer_states(tensor_rank, data_rank)
        self._check_buffers(states, tensor_rank, data_rank)
        return states

    def buffer(self, tensor_rank: int, container: Container, state: State) -> Tensor:
        """A flat buffer of optimizer state, mapped from disk."""
        model = self.model_states(tensor_rank, container.data_rank)
        states = (
            None
            if self.topology.zero_stage == 0
            else self.optimizer_states(tensor_rank, container.data_rank)
        )
        names = list(self.layout.shapes)
        return state_buffer(self.topology, model, states, container.key, state, names)

    def _optimizer_states(self, tensor_rank: int, data_rank: int) -> Any:
        name = optimizer_file(self.topology, tensor_rank=tensor_rank, data_rank=data_rank)
        return self._file(str(name))

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = pickles.load(self.path / name)
        return self._files[name]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def _check_buffers(self, states: Any, tensor_rank: int, data_rank: int) -> None:
        layout = self.layout
        for key in layout.keys(data_rank):
            container = Container(data_rank, key)
            for state, lengths in (("fp32", layout.filled), ("exp_avg", layout.lengths),
                                   ("exp_avg_sq", layout.lengths)):  # fmt: skip
                names = list(layout.shapes)
                try:
                    found = state_buffer(self.topology, None, states, key, state, names).numel()  # type: ignore[arg-type]
                except (KeyError, IndexError):
                    found = None
                if found != lengths[container]:
                    name = optimizer_file(
                        self.topology, tensor_rank=tensor_rank, data_rank=data_rank
                    )
                    raise CheckpointError(
                        f"{self.path / str(name)}: {state} of group {key} has {found} elements, "
                        f"but the parameters lie in {lengths[container]}. Not a layout that is "
                        "understood here, so nothing was read from it."
                    )


def state_buffer(
    topology: Topology, model: Any, states: Any, key: int, state: State, names: list[str]
) -> Tensor:
    """The flat buffer ``key`` of ``state`` within a rank's loaded files."""
    stage = topology.zero_stage
    if stage == 0:
        return _unpartitioned_buffer(topology, model, key, state, names).view(-1)
    optimizer = states["optimizer_state_dict"]
    if stage == 3:
        if state == "fp32":
            return optimizer["fp32_flat_groups"][key]
        return optimizer["optimizer_state_dict"]["state"][key][state]
    if state == "fp32":
        return optimizer["single_partition_of_fp32_groups"][key]
    return optimizer["base_optimizer_state"]["state"][key][state]


def torch_optimizer_state(topology: Topology, model: Any, states: Any) -> Any:
    """The torch optimizer's ``state_dict`` within a rank's loaded files."""
    if topology.zero_stage == 0:
        optimizer = model["optimizer"]
        return optimizer if topology.precision == "fp32" else optimizer["optimizer_state_dict"]
    optimizer = states["optimizer_state_dict"]
    name = "optimizer_state_dict" if topology.zero_stage == 3 else "base_optimizer_state"
    return optimizer[name]


def _unpartitioned_buffer(
    topology: Topology, model: Any, key: int, state: State, names: list[str]
) -> Tensor:
    if state != "fp32":
        return torch_optimizer_state(topology, model, None)["state"][key][state]
    if topology.precision == "fp32":
        return model["module"][names[key]]
    flat = [tensor for group in model["optimizer"]["fp32_groups"] for tensor in group]
    return flat[key]


def _first_header(path: Path) -> tuple[Mapping[str, Any], str]:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (path / name).is_file():
            header = pickles.load(path / name)
            if not isinstance(header, dict) or "ds_version" not in header:
                raise CheckpointError(f"{path / name}: not written by DeepSpeed.")
            return header, name
    raise CheckpointError(
        f"{path}: not a DeepSpeed checkpoint: neither mp_rank_00_model_states.pt nor "
        "zero_pp_rank_0_mp_rank_00_model_states.pt is there. Give a tag directory, or a directory "
        "with a file `latest`."
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
        sub_group_size=int(zero.get("sub_group_size", 1_000_000_000)),
    )


def _unpartitioned_groups(path: Path, header: Mapping[str, Any]) -> list[Group]:
    listed = (header.get("lag") or {}).get("parameter_groups")
    if listed is None:
        raise CheckpointError(
            f"{path}: a ZeRO-0 checkpoint keeps its optimizer state by number, and this one does "
            "not say which parameter has which. Resume it under ZeRO-1, save, and use that."
        )
    module = header["module"]
    return [{name: tuple(module[name].shape) for name in group} for group in listed]


def _join_subgroups(listed: list[dict[str, Shape]], states: Any) -> list[Group]:
    """ZeRO-3 lists shapes by sub-group; join those of one parameter group again."""
    groups: list[Group] = []
    inner = states["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
    for group in inner:
        members: dict[str, Shape] = {}
        for key in group["params"]:
            members |= listed[key]
        groups.append(members)
    return groups


def parameter_count(groups: list[Group]) -> int:
    """Elements of all parameters of one tensor rank."""
    return sum(numel(shape) for group in groups for shape in group.values())
