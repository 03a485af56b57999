"""Megatron-Core's ``torch_dist`` checkpoints, and torch's own Distributed Checkpoints.

Both are ``.metadata`` and data files (``dcp_metadata``).  Megatron-Core adds ``common.pt``, with
values that are not tensors, and ``metadata.json``, which it writes last.  ``common.pt`` is read
``weights_only`` with the few classes that training arguments hold; with others it is not read.
"""

import argparse
import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.families.describe_layers import describe_layers
from lag_megatron.checkpoint.megatron import dcp_metadata
from lag_megatron.checkpoint.megatron.dcp_metadata import Contents, StoredTensor
from lag_megatron.checkpoint.megatron.param_names import parameters_in
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.storage.torch_zip import damaged_records
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import CheckpointError
from lag_megatron.small_files import read_json

CONFIG, COMMON = "metadata.json", "common.pt"
_HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay")
_STATE_NAMES = {"param": "fp32", "fp32_param": "fp32"}
_OPTIMIZER = re.compile(r"(^|\.)(optim|optimizer|optimizers)\.|^state\.|^chained_\d+\.")
_MEGATRON_STATE = re.compile(r"optimizer\.state\.(?P<state>\w+)\.")
_MOMENT = re.compile(r"\.(?P<state>param|exp_avg|exp_avg_sq)(\.|$)")
_GROUP_ENTRY = re.compile(
    rf"(?P<group>.*\bparam_groups\..+)\.(?P<key>{'|'.join(_HYPER_PARAMETERS)})$"
)
_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WRITER = re.compile(r"__(\d+)_\d+\.distcp$")


def is_megatron(path: Path) -> bool:
    """Whether Megatron-Core wrote a directory, complete or not; else it is torch's format."""
    if (path / COMMON).is_file():
        return True
    config = path / CONFIG
    return config.is_file() and b"sharded_backend" in config.read_bytes()


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a directory that Megatron-Core wrote.

    Raises:
        CheckpointError: if they cannot be read.
    """
    found: dict[str, Any] = read_json(
        path / CONFIG,
        what="the settings of a checkpoint of Megatron-Core",
        error=CheckpointError,
        advice="Restore it from a copy.",
    )
    return found


def describe_dist_checkpoint(path: Path, names: ParamNames | None = None) -> dict[str, Any]:
    """Facts about a directory, and its problems; no tensor is read.

    Raises:
        CheckpointError: if its metadata cannot be read, or another backend of Megatron wrote it.
    """
    megatron = is_megatron(path)
    problems, notes = list(_finished(path) if megatron else ()), []
    contents = dcp_metadata.read_metadata(path)
    problems += dcp_metadata.problems(contents)
    common: Mapping[str, Any] = {}
    if megatron:
        try:
            common, note = read_common(path)
            notes += [note] if note else []
        except CheckpointError as error:
            problems.append(str(error))
    step = common.get("iteration") if megatron else recorded_step(contents)
    arguments = vars(common["args"]) if isinstance(common.get("args"), argparse.Namespace) else {}
    parameters = model_tensors(contents)
    ours = client_state(common)
    return {
        "format": _format(path, contents),
        "committed": (path / CONFIG).is_file() if megatron else True,
        "marker": CONFIG if megatron else dcp_metadata.METADATA,
        "step": step if isinstance(step, int) else None,
        "tokens": ours.get("tokens", _tokens(arguments)),
        "topology": _topology(contents, parameters, arguments),
        "parameters": sum(numel(tensor.shape) for tensor in parameters.values()),
        **describe_layers(model_shapes(parameters), names),
        "optimizer": _groups(common) if megatron else _recorded_groups(contents),
        "optimizer_states": _states(contents),
        "growth_history": list(ours.get("growth_history", [])),
        "problems": problems,
        "notes": notes,
    }


def find_dist_checkpoint_corruption(path: Path) -> Iterator[str]:
    """Yield stored values and records of ``common.pt`` that differ from their CRC32.

    Raises:
        CheckpointError: if the metadata, or ``common.pt`` as a whole, cannot be read.
    """
    yield from dcp_metadata.find_dcp_corruption(dcp_metadata.read_metadata(path))
    if (path / COMMON).is_file():
        for record in damaged_records(path / COMMON):
            yield f"{COMMON}: {record} differs from its checksum"


def read_common(path: Path) -> tuple[Mapping[str, Any], str]:
    """The values of ``common.pt``, and a note if they could not be read.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    file = path / COMMON
    if not file.is_file():
        raise CheckpointError(f"{file}: missing. Restore it, or use another checkpoint.")
    safe: list[Any] = [argparse.Namespace, *torch_pickle.STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = named[1] if named else "objects that are no plain values"
        return {}, f"{COMMON}: left unread, because it holds {what}: step and settings are unknown"
    except (RuntimeError, ValueError, EOFError, OSError, LookupError):
        size = file.stat().st_size
        raise CheckpointError(
            f"{file}: damaged or cut short ({size} bytes). Restore it from a copy."
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds no settings. Restore it from a copy.")
    return found, ""


def model_tensors(contents: Contents) -> dict[str, StoredTensor]:
    """The tensors that are parameters, by their names: neither optimizer nor extra state."""
    return {
        name: tensor
        for name, tensor in contents.tensors.items()
        if not _OPTIMIZER.search(name) and "rng_state" not in name and "_extra_state" not in name
    }


def client_state(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of this program's trainer; empty for checkpoints of other programs."""
    found = values.get("lag")
    return dict(found) if isinstance(found, dict) else {}


def model_shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, Shape]:
    """Shapes of parameters by name, of layers that are stacked along a first axis too."""
    stored = {name: tensor.shape for name, tensor in tensors.items() if tensor.shape}
    return {
        name: stored[place.key] if place.layer is None else stored[place.key][1:]
        for name, place in parameters_in(stored).items()
    }


def _finished(path: Path) -> Iterator[str]:
    file = path / CONFIG
    if not file.is_file():
        yield f"{CONFIG}: missing. It is written last, so the checkpoint was not finished"
        return
    try:
        backend = read_config(path).get("sharded_backend")
    except CheckpointError as error:
        yield str(error)
        return
    if backend != "torch_dist":
        raise CheckpointError(
            f"{file}: sharded_backend {backend!r}, but only 'torch_dist' is understood here."
        )


def _format(path: Path, contents: Contents) -> str:
    if is_megatron(path):
        return "Megatron-Core torch_dist"
    return " ".join(["torch DCP", *([contents.version] if contents.version else [])])


def _topology(
    contents: Contents, parameters: Mapping[str, StoredTensor], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Topology of the ranks that wrote it; None where it is not recorded."""
    precisions = {_PRECISION.get(t.dtype, str(t.dtype)) for t in parameters.values()}
    places = (place for _, place, _ in contents.places() if place is not None)
    ranks = {match[1] for place in places if (match := _WRITER.search(place.file))}
    return {
        "zero_stage": None,
        "data_parallel": arguments.get("data_parallel_size"),
        "tensor_parallel": arguments.get("tensor_model_parallel_size"),
        "pipeline_parallel": arguments.get("pipeline_model_parallel_size"),
        "precision": "+".join(sorted(precisions)) or None,
        "writers": len(ranks),
    }


def _tokens(arguments: Mapping[str, Any]) -> int | None:
    samples, length = arguments.get("consumed_train_samples"), arguments.get("seq_length")
    return samples * length if isinstance(samples, int) and isinstance(length, int) else None


def _states(contents: Contents) -> list[str]:
    """The optimizer states that are stored: masters, first and second moments, then others."""
    found = set()
    for name in contents.tensors:
        if not _OPTIMIZER.search(name):
            continue
        match = _MEGATRON_STATE.search(name) or _MOMENT.search(name)
        if match and (state := match["state"]) != "step":
            found.add(_STATE_NAMES.get(state, state))
    known = ("fp32", "exp_avg", "exp_avg_sq")
    return [*(s for s in known if s in found), *sorted(found - set(known))]


def _groups(common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hyper-parameters of the parameter groups of Megatron's plain or wrapped optimizer."""
    state: Any = common.get("optimizer")
    while isinstance(state, dict) and "param_groups" not in state:
        state = state.get("optimizer")
    groups = state["param_groups"] if isinstance(state, dict) else []
    return [
        {"tensors": len(g["params"]) if isinstance(g.get("params"), list) else None}
        | {key: g[key] for key in _HYPER_PARAMETERS if key in g}
        for g in groups
        if isinstance(g, dict)
    ]


def is_optimizer(name: str) -> bool:
    """Whether a stored tensor belongs to an optimizer, by its name."""
    return _OPTIMIZER.search(name) is not None


def recorded_step(contents: Contents) -> int | None:
    """The step, where one of the stored objects is one."""
    for name in contents.objects:
        if name.rpartition(".")[2] in ("step", "global_step", "iteration"):
            value = contents.read_object(name)
            if isinstance(value, int):
                return value
    return None


def _recorded_groups(contents: Contents) -> list[dict[str, Any]]:
    """Hyper-parameters of torch's parameter groups, each of which is stored as an object."""
    found: dict[str, dict[str, Any]] = {}
    for name in contents.objects:
        if match := _GROUP_ENTRY.match(name):
            group = found.setdefault(match["group"], {})
            group[match["key"]] = contents.read_object(name)
    plain = [json.loads(json.dumps(group, default=str)) for group in found.values()]
    texts = [json.dumps(group, sort_keys=True) for group in plain]
    by_text = dict(zip(texts, plain, strict=True))
    flat = any(not group.rpartition(".")[2].isdigit() for group in found)
    return [
        {"tensors": count if flat else None} | by_text[text]
        for text, count in Counter(texts).items()
    ]
