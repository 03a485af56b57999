"""The files of DeepSpeed's universal checkpoints: a folder of unsharded tensors per parameter.

They are ``zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt``, ``zero/optimizer_state.pt`` and
copies of the model files.  Converted from ZeRO-1 and 2, a state's file holds ``{"param": tensor,
"cat_dim": ...}``; from ZeRO-3 it is a bare flat tensor, and there is no ``step.pt``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.families.describe_layers import describe_layers
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.layout import STATES
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.storage.integrity import EVERYTHING, VerifyScope
from lag_megatron.checkpoint.storage.torch_zip import damaged_records
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import CheckpointError
from lag_megatron.small_files import read_pointer

FOLDER, POINTER, OPTIMIZER = "zero", "latest_universal", "optimizer_state.pt"


@dataclass(frozen=True)
class Universal:
    """A universal checkpoint whose tensors are still on disk.

    Attributes:
        path: the tag directory.
        header: the first model file.
        parameters: folder of each parameter and buffer, by name.
        shapes: trained parameters in flat order, each with one tensor rank's shape.
        frozen: the same for parameters without optimizer state.
    """

    path: Path
    header: Mapping[str, Any] = field(repr=False)
    parameters: dict[str, Path] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    frozen: dict[str, tuple[int, ...]] = field(repr=False)

    @staticmethod
    def open(path: Path) -> "Universal":
        """Read the headers and list the parameters.

        Raises:
            CheckpointError: if there is no header, or it cannot be read.
        """
        files = sorted(path.glob("mp_rank_*_model_states.pt"))  # one for each model rank
        of_zero3 = sorted(path.glob("zero_pp_rank_0_mp_rank_*_model_states.pt"))
        if files and of_zero3:
            raise CheckpointError(
                f"{path}: holds {files[0].name} and also {of_zero3[0].name}, of ZeRO-3: two "
                "checkpoints are mixed. Move the older files away, or convert again."
            )
        files = files or of_zero3
        if not files:
            raise CheckpointError(
                f"{path}: no mp_rank_00_model_states.pt, which the conversion copies last: "
                "it was not finished. Convert again."
            )
        headers = [torch_pickle.load(file) for file in files]
        shapes, frozen = _listed_shapes(files, headers)
        folders = {p.name: p for p in sorted((path / FOLDER).iterdir()) if p.is_dir()}
        return Universal(path, headers[0], folders, shapes, frozen)

    @property
    def model_ranks(self) -> int:
        """Number of model files of one data-parallel rank: tensor- times pipeline-parallel."""
        return int(self.header.get("mp_world_size", 1))

    @property
    def zero_stage(self) -> int | None:
        """ZeRO stage of the checkpoint that was converted."""
        config = self.header.get("ds_config") or {}
        stage = (config.get("zero_optimization") or {}).get("stage")
        return stage if isinstance(stage, int) else None

    def state(self, name: str, state: str) -> Tensor:
        """A parameter's ``fp32``, ``exp_avg``, ``exp_avg_sq`` or ``step``, mapped from disk.

        Raises:
            CheckpointError: if its file is missing, damaged or holds something else.
        """
        file = self.parameters[name] / f"{state}.pt"
        found = torch_pickle.load(file)
        tensor = found.get("param") if isinstance(found, dict) else found
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: holds no tensor. Convert again.")
        return tensor


def _listed_shapes(
    files: Sequence[Path], headers: Sequence[Any]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes of trained and of other parameters, which the model files agree on.

    Raises:
        CheckpointError: if they do not, or one lists a parameter twice.
    """
    shapes: dict[str, Shape] = {}
    frozen: dict[str, Shape] = {}
    for file, header in zip(files, headers, strict=True):
        groups = header.get("param_shapes") if isinstance(header, dict) else None
        if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
            raise CheckpointError(f"{file}: no param_shapes, so DeepSpeed did not write it.")
        if header.get("global_steps") != headers[0].get("global_steps"):
            raise CheckpointError(
                f"{file}: of step {header.get('global_steps')}, but {files[0].name} is of step "
                f"{headers[0].get('global_steps')}: two checkpoints are mixed. Convert again."
            )
        own: set[str] = set()
        listed = [(shapes, group) for group in groups]
        for known, group in [*listed, (frozen, header.get("frozen_param_shapes") or {})]:
            for name, shape in group.items():
                if name in own or known.setdefault(name, tuple(shape)) != tuple(shape):
                    raise CheckpointError(
                        f"{file}: lists {name} twice, or with another shape than "
                        f"{files[0].name}: two checkpoints are mixed. Convert again."
                    )
                own.add(name)
    return shapes, frozen


def looks_universal(path: Path) -> bool:
    """Whether a folder is a universal checkpoint's tag directory, complete or not."""
    return (path / FOLDER).is_dir()


def describe_universal(path: Path, names: ParamNames | None = None) -> dict[str, Any]:
    """Facts about a tag directory, and its problems; every file is mapped, no tensor is read.

    Raises:
        CheckpointError: if it has no header that can be read.
    """
    checkpoint = Universal.open(path)
    header, problems = checkpoint.header, list(_model_file_problems(checkpoint))
    groups, problem = _groups(checkpoint)
    counts: dict[str, int] = {}
    problems += [*problem, *_parameter_problems(checkpoint, counts)]
    ours = header.get("lag") or {}
    pointer = path.parent / POINTER
    config = header.get("ds_config") or {}
    degrees = header.get("checkpoint_parallel_dimensions") or {}
    found = {s for s in STATES for p in checkpoint.parameters.values() if (p / f"{s}.pt").is_file()}
    return {
        "format": f"DeepSpeed {header.get('ds_version', 'of unknown version')}, universal",
        "committed": pointer.is_file()
        and read_pointer(pointer, error=CheckpointError) == path.name,
        "marker": POINTER,
        "step": header.get("global_steps"),
        "tokens": ours.get("tokens"),
        "topology": {
            "zero_stage": checkpoint.zero_stage,
            "data_parallel": header.get("dp_world_size"),
            "tensor_parallel": degrees.get("tp_degree", checkpoint.model_ranks),
            "pipeline_parallel": degrees.get("pp_degree"),
            "precision": next(
                (p for p in ("bf16", "fp16") if (config.get(p) or {}).get("enabled")), "fp32"
            ),
        },
        "parameters": sum(counts.values()),
        **describe_layers({**checkpoint.shapes, **checkpoint.frozen}, names),
        "optimizer": groups,
        "optimizer_states": [state for state in STATES if state in found],
        "growth_history": list(ours.get("growth_history", [])),
        "problems": problems,
        "notes": [],
    }


def find_universal_corruption(path: Path, scope: VerifyScope = EVERYTHING) -> Iterator[str]:
    """Yield records that differ from their CRC32, and files that are no archives."""
    for file in scope.share(sorted(path.rglob("*.pt"))):
        name = file.relative_to(path)
        try:
            for record in damaged_records(file):
                yield f"{name}: {record} differs from its checksum"
        except CheckpointError:
            yield f"{name}: damaged or cut short ({file.stat().st_size} bytes)"


def _model_file_problems(checkpoint: Universal) -> Iterator[str]:
    """Model files that are missing or damaged."""
    names = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(checkpoint.model_ranks)]
    if checkpoint.zero_stage == 3:
        data_ranks = range(int(checkpoint.header.get("dp_world_size", 1)))
        names = [f"zero_pp_rank_{rank}_{name}" for name in names for rank in data_ranks]
    for name in names:
        try:
            torch_pickle.load(checkpoint.path / name)
        except CheckpointError as error:
            yield str(error)


def _groups(checkpoint: Universal) -> tuple[list[dict[str, Any]], list[str]]:
    """Hyper-parameters of the parameter groups, and the error if they cannot be read."""
    try:
        found = torch_pickle.load(checkpoint.path / FOLDER / OPTIMIZER)
    except CheckpointError as error:
        return [], [str(error)]
    groups = found.get("param_groups", []) if isinstance(found, dict) else []
    listed = checkpoint.header["param_shapes"]
    counts = [len(group) for group in listed] if len(listed) == len(groups) else []
    plain = (bool, int, float, str, list, tuple, type(None))
    return [
        {"tensors": counts[number] if counts else None}
        | {k: v for k, v in group.items() if k != "params" and isinstance(v, plain)}
        for number, group in enumerate(groups)
    ], []


def _parameter_problems(checkpoint: Universal, counts: dict[str, int]) -> Iterator[str]:
    """Yield problems of the parameters' folders; each one's element count is put in ``counts``."""
    for name in checkpoint.shapes:
        if name not in checkpoint.parameters:
            yield f"{FOLDER}/{name}: missing, but the model files list this parameter"
    # There are no steps after ZeRO-3, nor in files of older versions.
    stepped = any((folder / "step.pt").is_file() for folder in checkpoint.parameters.values())
    states = (*STATES, "step") if stepped else STATES
    for name, folder in checkpoint.parameters.items():
        present = {file.stem for file in folder.glob("*.pt")}
        missing = [state for state in states if state not in present]
        if present == {"fp32"} and not (name in checkpoint.shapes and _was_trained(folder)):
            missing = []  # a frozen parameter, a buffer, or one that never had a gradient
        yield from (f"{FOLDER}/{name}/{state}.pt: missing" for state in missing)
        sizes: dict[str, int] = {}
        for state in (state for state in states if state in present):
            try:
                sizes[state] = checkpoint.state(name, state).numel()
            except CheckpointError as error:
                yield str(error)
        yield from _size_problems(checkpoint, name, sizes)
        if "fp32" in sizes and (name in checkpoint.shapes or name in checkpoint.frozen):
            counts[name] = sizes["fp32"]


def _was_trained(folder: Path) -> bool:
    """Whether the weights are an optimizer's masters, not copies from the model."""
    try:
        found = torch_pickle.load(folder / "fp32.pt")
    except CheckpointError:
        return True
    return not isinstance(found, dict) or set(found) != {"param"}


def _size_problems(checkpoint: Universal, name: str, sizes: dict[str, int]) -> Iterator[str]:
    states = {state: count for state, count in sizes.items() if state != "step"}
    if len(set(states.values())) > 1:
        found = ", ".join(f"{state} {count}" for state, count in states.items())
        yield f"{FOLDER}/{name}: its states differ in their numbers of elements: {found}"
    if checkpoint.model_ranks > 1 or name not in checkpoint.shapes or "fp32" not in states:
        return  # the header has one rank's shape
    expected, found_elements = numel(checkpoint.shapes[name]), states["fp32"]
    # Rows that only pad the vocabulary are left out of a universal checkpoint.
    padded = "original_vocab_size" in (checkpoint.header.get("universal_checkpoint_info") or {})
    if found_elements != expected and not (padded and found_elements < expected):
        yield (
            f"{FOLDER}/{name}/fp32.pt: {found_elements} elements, "
            f"but the model files give it {expected}"
        )
