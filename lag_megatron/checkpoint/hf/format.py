"""The files of a transformers directory: ``config.json`` and weights, without an optimizer.

A safetensors file is eight bytes with the length of its header, the header as JSON, and the bytes
of the tensors, so nothing in it can run code.  ``pytorch_model.bin`` is a pickle, which is listed
here but not opened.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.families.describe_layers import describe_layers
from lag_megatron.checkpoint.hf.grown_config import DEPTH_KEYS
from lag_megatron.checkpoint.hf.weight_files import (
    INDEX,
    PICKLED,
    PICKLED_INDEX,
    WEIGHTS,
    pickled_files,
    safetensors_files,
    weight_notes,
)
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.storage.integrity import EVERYTHING, VerifyScope
from lag_megatron.checkpoint.storage.torch_zip import damaged_records, has_checksums
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import CheckpointError
from lag_megatron.small_files import parse_json, read_json

CONFIG, TRAINER = "config.json", "trainer_state.json"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_BITS = {"F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6}
_PRECISION = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """A tensor in a safetensors file; ``begin`` and ``end`` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: Shape
    begin: int
    end: int


def read_safetensors_header(file: Path) -> dict[str, SafetensorsEntry]:
    """The tensors of a safetensors file by name; the file's length is checked against them.

    Raises:
        CheckpointError: if it is missing, damaged or cut short.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: missing. Restore it from a copy.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(
                f"{file}: damaged or cut short ({size} bytes): its header should have {length}. "
                "Restore it from a copy."
            )
        text = stream.read(length)
    try:
        found = parse_json(
            text, where=file, what="the header of a safetensors file", error=CheckpointError
        )
        found.pop("__metadata__", None)
        entries = {name: _entry(file, entry, 8 + length) for name, entry in found.items()}
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: damaged: its header cannot be read ({error}). Restore it from a copy."
        ) from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        bits = numel(entry.shape) * _BITS.get(entry.dtype, 0)
        if entry.begin != end or (bits and (entry.end - entry.begin) * 8 != bits):
            raise CheckpointError(
                f"{file}: damaged: {name} does not lie where it should. Restore it from a copy."
            )
        end = entry.end
    if size != end:
        raise CheckpointError(
            f"{file}: {'cut short' if size < end else 'damaged'}: {size} bytes, expected {end}. "
            "Restore it from a copy."
        )
    return entries


def looks_like_transformers(path: Path) -> bool:
    """Whether a directory holds weights or a ``config.json`` of transformers, complete or not."""
    names = (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)
    if any((path / name).is_file() for name in names) or any(path.glob("model-*.safetensors")):
        return True
    try:
        return isinstance(_read_json(path / CONFIG).get("model_type"), str)
    except CheckpointError:
        return False


def describe_transformers(path: Path, names: ParamNames | None = None) -> dict[str, Any]:
    """Facts about a model's directory, and its problems; only headers of weights are read."""
    problems: list[str] = []
    config, trainer = (_settings(path / name, problems) for name in (CONFIG, TRAINER))
    if not (path / CONFIG).is_file():
        problems.append(f"{CONFIG}: missing. Without it nobody can say what the weights are for")
    tensors, problem = tensors_of(path)
    pickled: list[str] = []
    if not (tensors or problem):
        try:
            pickled = pickled_files(path).names
        except CheckpointError as error:
            problem.append(str(error))
    if not (tensors or problem or pickled):
        problems.append(f"{path}: no weights: neither {WEIGHTS} nor {INDEX} nor {PICKLED}")
    problems += [*problem, *_pickle_problems(path, pickled)]
    stacks = describe_layers({name: entry.shape for name, entry in tensors.items()}, names)
    layers = stacks["layers"]
    said = next((config[k] for k in DEPTH_KEYS if isinstance(config.get(k), int)), None)
    if layers and said is not None and layers < said:
        problems.append(f"{CONFIG}: says {said} layers, but the weights are of {layers}")
    precisions = {_PRECISION.get(entry.dtype, entry.dtype) for entry in tensors.values()}
    architectures = config.get("architectures") or [config.get("model_type", "unknown model")]
    return {
        "format": f"Hugging Face transformers, {architectures[0]}",
        "committed": None,
        "marker": None,
        "step": trainer.get("global_step"),
        "tokens": trainer.get("num_input_tokens_seen") or None,
        "topology": {
            "zero_stage": None,
            "data_parallel": None,
            "tensor_parallel": None,
            "precision": "+".join(sorted(precisions)) or None,
        },
        "parameters": sum(numel(e.shape) for e in tensors.values()) if tensors else None,
        **stacks,
        "layers": layers or said,
        "optimizer": [],
        "optimizer_states": [],
        "growth_history": [],
        "problems": problems,
        "notes": [
            *(f"{name}: holds the weights as a pickle, not opened" for name in pickled),
            *weight_notes(path),
        ],
    }


def find_transformers_corruption(path: Path, scope: VerifyScope = EVERYTHING) -> Iterator[str]:
    """Yield records of pickled weights that differ from their CRC32; safetensors has none."""
    for file in scope.share(sorted(path.glob("*.bin"))):
        if is_zip(file):
            for record in damaged_records(file):
                yield f"{file.name}: {record} differs from its checksum"


def tensors_of(path: Path) -> tuple[dict[str, SafetensorsEntry], list[str]]:
    """All tensors of the safetensors files by name, and the problems of those files."""
    problems: list[str] = []
    tensors: dict[str, SafetensorsEntry] = {}
    try:
        files = safetensors_files(path)
    except CheckpointError as error:
        return {}, [str(error)]
    for name in files.names:
        try:
            found = read_safetensors_header(path / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        gone = [t for t, file in (files.placed or {}).items() if file == name and t not in found]
        if gone:
            problems.append(f"{name}: lacks {gone[0]}, which {INDEX} says it holds")
        tensors |= {tensor: entry for tensor, entry in found.items() if files.holds(name, tensor)}
    return tensors, problems


def _pickle_problems(path: Path, names: list[str]) -> Iterator[str]:
    for name in names:
        file = path / name
        if not file.is_file():
            yield f"{file}: missing. Restore it from a copy."
        elif is_zip(file):  # only the zip directory is read, not the pickle
            try:
                has_checksums(file)
            except CheckpointError as error:
                yield str(error)


def is_zip(file: Path) -> bool:
    """Whether ``torch.save`` of version 1.6 or later wrote a file."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _entry(file: Path, entry: Mapping[str, Any], start: int) -> SafetensorsEntry:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    return SafetensorsEntry(file, str(entry["dtype"]), shape, start + int(begin), start + int(end))


def _settings(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return _read_json(file) if file.is_file() else {}
    except CheckpointError as error:
        problems.append(str(error))
        return {}


def _read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(
        file,
        what="settings of a transformers model",
        error=CheckpointError,
        advice="Restore it from a copy.",
    )
    return found
