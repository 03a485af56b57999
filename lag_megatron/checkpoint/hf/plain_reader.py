"""A transformers directory under its own parameter names, for an engine of that very model."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.hf.tensors import FLOAT_DTYPES, LazyTensor, open_tensors
from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.deepspeed_defaults import default_header
from lag_megatron.checkpoint.state.layout import GroupState, ParamGroup, State
from lag_megatron.checkpoint.state.source import UnshardedCheckpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.errors import CheckpointError


def has_names_of(path: Path, names: Sequence[str]) -> bool:
    """Whether a directory stores tensors under parameter names of a model."""
    return not set(open_tensors(path)).isdisjoint(names)


def open_under_own_names(
    path: Path,
    groups: Sequence[Sequence[str]],
    untrained: Sequence[str],
    *,
    aliases: Mapping[str, str],
    buffers: Sequence[str],
) -> UnshardedCheckpoint:
    """Open a directory for a model whose parameters have the names of its tensors.

    The weights become fp32 masters, the moments are 0, and no optimizer settings are given.

    Args:
        path: with weights as safetensors or ``pytorch_model.bin``.
        groups: names by parameter group, of a model with at least the directory's layers.
        untrained: names of parameters that the optimizer does not train.
        aliases: further names of tied parameters, with the name that owns the values.
        buffers: names of the model's saved buffers.

    Raises:
        CheckpointError: if a tensor is of no use to the model, or is not a floating-point one.
    """
    return _PlainReader(path, aliases).source(groups, untrained, buffers)


class _PlainReader:
    def __init__(self, path: Path, aliases: Mapping[str, str]) -> None:
        self._path, self._aliases = path, aliases

    def source(
        self, groups: Sequence[Sequence[str]], untrained: Sequence[str], buffers: Sequence[str]
    ) -> UnshardedCheckpoint:
        """The checkpoint as growth reads it."""
        self._refuse_others([name for group in groups for name in group], untrained, buffers)
        listed = [self._shapes(group) for group in groups]
        header = default_header(list(self._tensors), client_state={}, step=0)
        header["module"] |= {name: self._whole(name) for name in buffers if name in self._tensors}
        return UnshardedCheckpoint(
            path=self._path,
            header=header,
            groups=listed,
            group_states=[GroupState({}, {"step": torch.tensor(0.0)}) for _ in listed],
            read=self._read,
            untrained=self._shapes(sorted(untrained)),
            check=self._check,
            aliases=self._aliases,
        )

    @cached_property
    def _tensors(self) -> dict[str, LazyTensor]:
        return open_tensors(self._path)

    def _shapes(self, names: Sequence[str]) -> ParamGroup:
        return {name: self._tensors[name].shape for name in names if name in self._tensors}

    def _refuse_others(
        self, trained: Sequence[str], untrained: Sequence[str], buffers: Sequence[str]
    ) -> None:
        known = {*trained, *untrained, *buffers, *self._aliases}
        if extra := sorted(set(self._tensors) - known):
            raise CheckpointError(
                f"{self._path}: {extra[0]} ({len(extra)} such) is not in the engine's model. Build "
                "the engine with the class that config.json names."
            )
        for name in (*trained, *untrained):
            stored = self._tensors.get(name)
            if stored is not None and stored.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{stored.file}: {name} is of the type {stored.dtype}, expected F32, BF16 or "
                    "F16: quantised weights cannot be trained."
                )

    def _read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements ``start .. start + length`` of a parameter; moments are 0."""
        if state != "fp32":
            return torch.zeros(length)
        stored = self._tensors[name]
        width = numel(stored.shape[1:])
        first, last = start // width, -(-(start + length) // width)
        values = stored.rows(first, last).reshape(-1)
        begin = start - first * width
        return values[begin : begin + length]

    def _whole(self, name: str) -> Tensor:
        stored = self._tensors[name]
        whole: Tensor = stored.values[:] if stored.shape else stored.values[...]
        return whole

    def _check(self, scope: VerifyScope) -> None:
        """Verify checksums, and that tied weights stored twice are equal; raises."""
        committed = manifest.is_committed(self._path)
        if found := list(
            scope.find_corrupted_files(self._path)
            if committed
            else hf_format.find_transformers_corruption(self._path, scope)
        ):
            raise CheckpointError(f"{self._path}: damaged: {found[0]}. Restore it from a copy.")
        twice = [(n, o) for n, o in self._aliases.items() if {n, o} <= self._tensors.keys()]
        for name, owner in scope.share(twice):
            if not self._tensors[name].equals(self._tensors[owner]):
                raise CheckpointError(
                    f"{self._path}: {name} differs from {owner}, but the engine's model ties them. "
                    "Build it with tie_word_embeddings=False, or leave one of them out."
                )
