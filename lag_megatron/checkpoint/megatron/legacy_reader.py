"""Megatron-LM's legacy checkpoints: a ``torch.save`` file for each tensor-parallel rank.

The files are ``mp_rank_00/model_optim_rng.pt`` and so on, with a model of Megatron-Core.  Only
weights are read: the optimizer's states are numbered in an order that the files do not record.
"""

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import Tensor

from lag_megatron.checkpoint.families.describe_layers import describe_layers
from lag_megatron.checkpoint.families.layer_stack import count_layers
from lag_megatron.checkpoint.megatron.arguments import model_of
from lag_megatron.checkpoint.megatron.param_names import in_model_order, own_name
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.deepspeed_defaults import (
    SETTINGS_NOTE,
    decay_groups,
    default_group_states,
    default_header,
    module_keys,
)
from lag_megatron.checkpoint.state.layout import State
from lag_megatron.checkpoint.state.source import UnshardedCheckpoint
from lag_megatron.checkpoint.state.tensor_parallel import is_gated, shard_boxes, unsharded_shape
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.storage.integrity import EVERYTHING, VerifyScope
from lag_megatron.checkpoint.storage.torch_zip import damaged_records
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import CheckpointError

_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d+)$")
# Random states are pickled as numpy arrays.
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def looks_legacy(path: Path) -> bool:
    """Whether a directory holds the file of at least one rank."""
    return any(path.glob(f"mp_rank_*/{_FILE}"))


def open_legacy(path: Path) -> UnshardedCheckpoint:
    """Open every rank's file; tensors are mapped from disk.

    Raises:
        CheckpointError: if a rank is missing, ranks are pipeline-parallel, a file is damaged, or
            the model is not Megatron-Core's.
    """
    return _LegacyReader(path).source


def describe_legacy(path: Path, names: ParamNames | None = None) -> dict[str, Any]:
    """Facts about a directory, and its problems; no tensor is read."""
    facts: dict[str, Any] = {
        "format": "Megatron-LM, a file for each rank",
        "committed": None,
        "marker": None,
        "step": None,
        "tokens": None,
        "topology": dict.fromkeys(("zero_stage", "data_parallel", "tensor_parallel", "precision")),
        "parameters": None,
        "layers": None,
        "layer_stacks": [],
        "optimizer": [],
        "optimizer_states": [],
        "growth_history": [],
        "problems": [],
        "notes": [],
    }
    try:
        reader = _LegacyReader(path)
        shapes, source = reader.shapes, reader.source
    except CheckpointError as error:
        return facts | {"problems": [str(error)]}
    return facts | {
        "step": source.step,
        "topology": facts["topology"] | {"tensor_parallel": len(reader.ranks)},
        "parameters": sum(map(numel, shapes.values())),
        **describe_layers(shapes, names),
        "notes": list(source.notes),
    }


def find_legacy_corruption(path: Path, scope: VerifyScope = EVERYTHING) -> Iterator[str]:
    """Yield records that differ from their CRC32."""
    for file in scope.share(sorted(path.glob(f"mp_rank_*/{_FILE}"))):
        for record in damaged_records(file):
            yield f"{file.relative_to(path)}: {record} differs from its checksum"


@dataclass(frozen=True)
class _LegacyReader:
    path: Path

    @property
    def source(self) -> UnshardedCheckpoint:
        names = in_model_order(self.shapes)
        groups = decay_groups({name: self.shapes[name] for name in names})
        first = self.ranks[0]
        step = int(first.get("iteration") or 0)
        arguments = first.get("args")
        model = model_of(arguments) if isinstance(arguments, argparse.Namespace) else None
        state = {
            "step": step,
            "tokens": 0,
            "num_layers": count_layers(self.shapes),
            "parameter_groups": [list(group) for group in groups],
            "growth_history": [],
            **({"model": model} if model else {}),
        }
        return UnshardedCheckpoint(
            path=self.path,
            header=default_header(module_keys(names), client_state=state, step=step),
            groups=groups,
            group_states=default_group_states(groups),
            read=self.read,
            check=self.check,
            notes=[
                "the optimizer's states are left out: the files do not say whose they are",
                SETTINGS_NOTE,
            ],
        )

    @cached_property
    def ranks(self) -> list[Mapping[str, Any]]:
        """The objects of every tensor-parallel rank's file."""
        folders = sorted(self.path.glob("mp_rank_*"))
        numbers = [match and int(match[1]) for match in map(_RANK.search, map(str, folders))]
        if numbers != list(range(len(folders))):
            found = ", ".join(folder.name for folder in folders)
            raise CheckpointError(
                f"{self.path}: has {found}, expected mp_rank_00 and on: a rank is missing, or "
                "pipeline parallelism cut the model, which is not understood here. Merge the "
                "stages with Megatron-LM's own tool."
            )
        return [_load(folder / _FILE) for folder in folders]

    @cached_property
    def parts(self) -> list[dict[str, Tensor]]:
        """Every rank's parameters."""
        found = [self._parameters_of(rank) for rank in self.ranks]
        if not found[0]:
            raise CheckpointError(
                f"{self.path}: holds no model of Megatron-Core: its entries are "
                f"{', '.join(map(str, self.ranks[0]['model'])) or 'none'}. Convert it with "
                "Megatron-LM's own tool first."
            )
        return found

    def _parameters_of(self, rank: Mapping[str, Any]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stored, value in rank["model"].items():
            if isinstance(value, Tensor) and not stored.endswith("_extra_state"):
                name = own_name(stored)
                if name in found:
                    raise CheckpointError(
                        f"{self.path}: {name} is stored twice, also as {stored}: either could be "
                        "meant. Save it again with Megatron-LM."
                    )
                found[name] = value
        return found

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of unsharded parameters."""
        size = len(self.parts)
        return {
            name: unsharded_shape(name, tuple(part.shape), tensor_size=size)
            for name, part in self.parts[0].items()
        }

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements ``start .. start + length`` of a parameter; moments are 0."""
        if state != "fp32":
            return torch.zeros(length)
        shape, size = self.shapes[name], len(self.parts)
        width = numel(shape[1:])
        first, last = start // width, -(-(start + length) // width)
        rows = torch.empty((last - first, *shape[1:]), dtype=self.parts[0][name].dtype)
        for rank, part in enumerate(self.parts):
            for piece in shard_boxes(
                name, shape, tensor_rank=rank, tensor_size=size, gated=is_gated(self.shapes)
            ):
                low = max(first, piece.box.low[0])
                high = min(last, piece.box.low[0] + piece.box.shape[0])
                if low >= high:
                    continue
                there = low - piece.box.low[0] + piece.local[0]
                taken = part[name][there : there + high - low]
                columns = [
                    slice(a, a + n)
                    for a, n in zip(piece.box.low[1:], piece.box.shape[1:], strict=True)
                ]
                rows[(slice(low - first, high - first), *columns)] = taken
        begin = start - first * width
        return rows.view(-1)[begin : begin + length]

    def check(self, scope: VerifyScope) -> None:
        """Verify the content against its checksums; raises ``CheckpointError``."""
        if found := list(find_legacy_corruption(self.path, scope)):
            raise CheckpointError(f"{self.path}: damaged: {found[0]}. Restore it from a copy.")


def _load(file: Path) -> Mapping[str, Any]:
    """A rank's objects, mapped from disk and read ``weights_only``.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds no model.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: missing. Restore it from a copy.")
    safe: list[Any] = [argparse.Namespace, *torch_pickle.STAND_INS.items(), *_NUMPY]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds objects that are not known here ({torch_pickle.cause(error)}). "
            "Reading them could run code, so it was left alone. Save it as torch_dist."
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file}: damaged or cut short: {torch_pickle.cause(error)}. Restore it from a copy."
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise CheckpointError(f"{file}: holds no model of Megatron-Core.")
    return found
