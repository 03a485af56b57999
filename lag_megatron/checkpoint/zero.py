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

from lag_megatron.checkpoint import commit, pickles
from lag_megatron.checkpoint.boxes import Shape
from lag_megatron.checkpoint.layout import (
    DEFAULT_SUB_GROUP_SIZE,
    STATES,
    Container,
    Group,
    Layout,
    State,
    Topology,
    make_layout,
)
from lag_megatron.checkpoint.zero_files import (
    files_of,
    model_file,
    optimizer_file,
    state_buffer,
    step_counts,
)
from lag_megatron.errors import CheckpointError

__all__ = ["ZeroCheckpoint", "files_of", "resolve"]

# Options of DeepSpeed that change the order or padding of flat buffers in ways not handled here.
_UNKNOWN_ORDERS = ("round_robin_gradients", "parameter_alignment")
_FOREIGN = "not written by DeepSpeed, or by a version that is not understood here."


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
        if commit.is_committed(path):
            commit.check_sizes(path)
        header, name = _first_header(path)
        try:
            topology = _topology(path, header, name)
        except KeyError as error:
            raise CheckpointError(f"{path / name}: has no entry {error}: {_FOREIGN}") from None
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
        header = self._load(model_file(self.topology, tensor_rank=tensor_rank, data_rank=0))
        if self.topology.zero_stage == 0:
            return _unpartitioned_groups(self.path, header)
        listed: list[Group] = [
            {n: tuple(shape) for n, shape in g.items()} for g in header["param_shapes"]
        ]
        if self.topology.zero_stage != 3:
            return listed
        return _join_subgroups(listed, self._load(self._optimizer_file(tensor_rank, 0)))

    def model_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of a model file, of the same step as all others."""
        if self.topology.zero_stage != 3:
            data_rank = 0
        name = model_file(self.topology, tensor_rank=tensor_rank, data_rank=data_rank)
        states = self._load(name)
        if states.get("global_steps") != self.step:
            raise self._other_step(name, states.get("global_steps"), self.step)
        if self.topology.zero_stage == 0 and name not in self._checked:
            self._check_buffers(name, states, None, 0)
            self._checked.add(name)
        return states

    def optimizer_states(self, tensor_rank: int, data_rank: int) -> Any:
        """The objects of an optimizer file, of the layout and the step of all others."""
        name = self._optimizer_file(tensor_rank, data_rank)
        states = self._load(name)
        if name not in self._checked:
            self._check_buffers(name, None, states, data_rank)
            first = self._load(self._optimizer_file(0, 0))
            counts = [step_counts(self.topology, s) for s in (states, first)]
            if counts[0] != counts[1]:
                raise self._other_step(name, *counts)
            self._checked.add(name)
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

    def _optimizer_file(self, tensor_rank: int, data_rank: int) -> str:
        return str(optimizer_file(self.topology, tensor_rank=tensor_rank, data_rank=data_rank))

    def _load(self, name: str) -> Any:
        if name not in self._files:
            states = pickles.load(self.path / name)
            if not isinstance(states, dict) or "ds_version" not in states:
                raise CheckpointError(f"{self.path / name}: {_FOREIGN}")
            self._files[name] = states
        return self._files[name]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _checked(self) -> set[str]:
        return set()

    def _other_step(self, name: str, found: object, expected: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path / name}: of step {found}, but the first file is of step {expected}: "
            "files of different checkpoints are mixed. Restore the right one, or use another tag."
        )

    def _check_buffers(self, file: str, model: Any, states: Any, data_rank: int) -> None:
        layout = self.layout
        names = list(layout.shapes)
        for key in layout.keys(data_rank):
            for state in STATES:
                lengths = layout.filled if state == "fp32" else layout.lengths
                try:
                    buffer = state_buffer(self.topology, model, states, key, state, names)
                    found = f"has {buffer.numel()} elements"
                except (LookupError, TypeError, AttributeError):
                    found = "is missing"
                expected = lengths[Container(data_rank, key)]
                if found != f"has {expected} elements":
                    raise CheckpointError(
                        f"{self.path / file}: {state} of buffer {key} {found}, but its parameters "
                        f"take {expected}. Only Adam's state in DeepSpeed's usual layout is "
                        "understood here, so nothing was read from it."
                    )


def _first_header(path: Path) -> tuple[Mapping[str, Any], str]:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (path / name).is_file():
            header = pickles.load(path / name)
            if not isinstance(header, dict) or "ds_version" not in header:
                raise CheckpointError(f"{path / name}: {_FOREIGN}")
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
        sub_group_size=int(zero.get("sub_group_size") or DEFAULT_SUB_GROUP_SIZE),
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


def _join_subgroups(listed: list[Group], states: Any) -> list[Group]:
    """ZeRO-3 lists shapes by sub-group; join those of one parameter group again."""
    groups: list[Group] = []
    inner = states["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
    for group in inner:
        members: dict[str, Shape] = {}
        for key in group["params"]:
            members |= listed[key]
        groups.append(members)
    return groups
