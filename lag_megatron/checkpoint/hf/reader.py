"""Importing a transformers directory: weights become fp32 masters, and moments are 0."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.families.roles import megatron_role
from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.hf.architecture import ARCHITECTURES, Architecture, read_config
from lag_megatron.checkpoint.hf.tensor_map import (
    Heads,
    RowRun,
    TensorMapping,
    expand,
    row_runs,
    transformers_shapes,
)
from lag_megatron.checkpoint.hf.tensors import FLOAT_DTYPES, LazyTensor, open_tensors
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.deepspeed_defaults import (
    SETTINGS_NOTE,
    decay_groups,
    default_client_state,
    default_group_states,
    default_header,
    module_keys,
)
from lag_megatron.checkpoint.state.layout import State
from lag_megatron.checkpoint.state.source import UnshardedCheckpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.config import ModelConfig, padded_vocab_size
from lag_megatron.errors import CheckpointError, ConfigError


def open_transformers(path: Path, *, vocab_size: int | None = None) -> UnshardedCheckpoint:
    """Open a directory by its configuration and headers; tensors stay on disk.

    Args:
        path: with ``config.json`` and weights as safetensors or ``pytorch_model.bin``.
        vocab_size: rows of the vocabulary.  Rows beyond the directory's own repeat its last one, as
            Megatron-LM's converters do: rows of zeros would take part in every softmax with logit
            0.  The default is the number of tokens rounded up to a multiple of 128.

    Raises:
        ConfigError: if the model is not supported.
        CheckpointError: naming a tensor that is missing, unexpected, or of another shape.
    """
    settings = read_config(path)
    found = [a for a in ARCHITECTURES if a.model_type == settings["model_type"]]
    if not found:
        known = ", ".join(a.model_type for a in ARCHITECTURES)
        raise ConfigError(
            f"{path}: model_type {settings['model_type']!r} is not known here. Known: {known}."
        )
    (architecture,) = found
    tokens = int(settings["vocab_size"])
    rows = padded_vocab_size(tokens) if vocab_size is None else vocab_size
    if rows < tokens:
        raise ConfigError(f"{path}: has {tokens} tokens, but --vocab-size is {rows}.")
    try:
        model = ModelConfig(**architecture.model(settings), vocab_size=rows)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if misfits := architecture.misfits(model):
        raise ConfigError(f"{path}: {architecture.name} needs {'; '.join(misfits)}")
    special = {key: value for key, value in settings.items() if key.endswith("_token_id")}
    return Import(path, architecture, model, tokens, special).source


@dataclass(frozen=True)
class Import:
    """An import, checked before a tensor is read.

    Attributes:
        path: the directory.
        architecture: of the directory.
        model: the imported model.
        tokens: rows of the directory's vocabulary.
        special_tokens: the ``*_token_id`` entries of ``config.json``.
        notes: remarks for the user.
    """

    path: Path
    architecture: Architecture
    model: ModelConfig
    tokens: int
    special_tokens: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> UnshardedCheckpoint:
        """The checkpoint as growth and writers read it."""
        groups = decay_groups(
            {name: self._shape(mapping) for name, mapping in self.mappings.items()}
        )
        state = default_client_state(self.model, groups)
        state |= {"vocabulary": self.tokens, "special_tokens": self.special_tokens}
        keys = module_keys(list(self.mappings))
        return UnshardedCheckpoint(
            path=self.path,
            header=default_header(keys, client_state=state, step=0),
            groups=groups,
            group_states=default_group_states(groups),
            read=self.read,
            check=self.check,
            notes=[*self.notes, SETTINGS_NOTE],
        )

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements ``start .. start + length`` of a Megatron parameter; moments are 0."""
        if state != "fp32":
            return torch.zeros(length)
        mapping = self.mappings[name]
        width = numel(self._shape(mapping)[1:])
        first, last = start // width, -(-(start + length) // width)
        found = list(self._rows(mapping, first, last))
        values = found[0] if len(found) == 1 else torch.cat(found)
        begin = start - first * width
        return values.reshape(-1)[begin : begin + length]

    def check(self, scope: VerifyScope) -> None:
        """Verify checksums, and that tied weights stored twice are equal.

        Raises:
            CheckpointError: naming the file, or both tensors.
        """
        committed = manifest.is_committed(self.path)
        if found := list(
            scope.find_corrupted_files(self.path)
            if committed
            else hf_format.find_transformers_corruption(self.path, scope)
        ):
            raise CheckpointError(f"{self.path}: damaged: {found[0]}. Restore it from a copy.")
        for other, owner in scope.share(self._tied):
            if not self.tensors[other].equals(self.tensors[owner]):
                raise CheckpointError(
                    f"{self.path}: {other} differs from {owner}, but config.json says that they "
                    "are tied. Set tie_word_embeddings to false, or leave one of them out."
                )

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """The directory's tensors by the names of the whole model."""
        found = open_tensors(self.path)
        prefix = self.architecture.prefix
        bare = not any(name.startswith(prefix) for name in found)
        return {_name(name, prefix if bare else ""): stored for name, stored in found.items()}

    @cached_property
    def mappings(self) -> dict[str, TensorMapping]:
        """The mapping of each tensor by Megatron's name, in the order of the model.

        Raises:
            CheckpointError: if tensors are missing, unexpected or of other shapes.
        """
        expanded = expand(
            self.architecture.mappings,
            num_layers=self.model.num_layers,
            bias=self.model.bias,
            tied_embeddings=self.model.tied_embeddings,
        )
        mappings = {mapping.megatron: mapping for mapping in expanded}
        expected: dict[str, Shape] = {}
        for mapping in mappings.values():
            full = self._full_shape(mapping)
            expected.update(
                zip(
                    mapping.transformers,
                    transformers_shapes(mapping, full, self.heads),
                    strict=True,
                )
            )
        self._refuse_others(expected)
        return mappings

    @cached_property
    def heads(self) -> Heads:
        """The model's query groups and head size."""
        model = self.model
        return Heads(model.num_query_groups, model.hidden_size // model.num_attention_heads)

    def _refuse_others(self, expected: Mapping[str, Shape]) -> None:
        tied = {other for other, _ in self._tied}
        ignored = [name for name in self.tensors if self._is_ignored(name)]
        extra = sorted(set(self.tensors) - set(expected) - tied - set(ignored))
        missing = sorted(set(expected) - set(self.tensors))
        for names, what in ((missing, "is missing"), (extra, "is not a tensor of this model")):
            if names:
                raise CheckpointError(
                    f"{self.path}: {names[0]} {what} ({len(names)} such), so the weights are not "
                    f"those of the {self.architecture.name} that config.json describes."
                )
        for name, shape in expected.items():
            stored = self.tensors[name]
            if stored.shape != shape:
                raise CheckpointError(
                    f"{stored.file}: {name} has shape {stored.shape}, expected {shape} by "
                    "config.json."
                )
            if stored.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{stored.file}: {name} is of the type {stored.dtype}, expected F32, BF16 or "
                    "F16: quantised weights cannot be trained."
                )
        left = sorted({name.partition(".layer.")[0] for name in ignored})
        if left:
            self.notes.append(f"left out, not of {self.architecture.name}: {', '.join(left)}")

    def _is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.architecture.ignored)

    @cached_property
    def _tied(self) -> list[tuple[str, str]]:
        """Names under which files repeat a tied tensor, with the name that owns the values."""
        pairs = [
            ("lm_head.weight", "transformer.wte.weight"),
            ("lm_head.weight", "model.embed_tokens.weight"),
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ]
        tied = self.model.tied_embeddings
        return [
            (other, owner)
            for other, owner in pairs
            if tied and other in self.tensors and owner in self.tensors
        ]

    def _shape(self, mapping: TensorMapping) -> Shape:
        """Shape of Megatron's parameter."""
        shape = self._full_shape(mapping)
        if mapping.kind == "vocabulary":
            return (int(self.model.vocab_size), *shape[1:])
        return shape

    def _full_shape(self, mapping: TensorMapping) -> Shape:
        """Shape of Megatron's parameter without vocabulary padding."""
        model = self.model
        outs = {
            "linear_qkv": model.hidden_size + 2 * self.heads.groups * self.heads.head_size,
            "linear_fc1": model.ffn_hidden_size * (2 if mapping.kind == "gate_up" else 1),
        }
        kind = mapping.megatron.split(".")[-2]
        out = outs.get(kind, model.hidden_size)
        out = {
            "word_embeddings": self.tokens,
            "output_layer": self.tokens,
            "position_embeddings": model.seq_length,
            "tokentype_embeddings": model.token_types,
        }.get(kind, out)
        if megatron_role(mapping.megatron) in ("bias", "norm_weight"):
            return (out,)
        return (out, model.ffn_hidden_size if kind == "linear_fc2" else model.hidden_size)

    def _rows(self, mapping: TensorMapping, first: int, last: int) -> Iterator[Tensor]:
        """Rows ``first .. last`` of Megatron's parameter, in several tensors."""
        known = self.tokens if mapping.kind == "vocabulary" else last
        for run in _within(
            row_runs(mapping, self._full_shape(mapping)[0], self.heads), first, last
        ):
            stored = self.tensors[mapping.transformers[run.part]]
            yield stored.rows(run.start, run.start + run.count, transposed=mapping.transposed)
        if last > known:
            (name,) = mapping.transformers
            padding = self.tensors[name].rows(known - 1, known)
            yield padding.expand(last - max(first, known), *padding.shape[1:])


def _within(found: Sequence[RowRun], first: int, last: int) -> Iterator[RowRun]:
    """The parts of runs within rows ``first .. last``."""
    for run in found:
        low, high = max(run.low, first), min(run.low + run.count, last)
        if low < high:
            yield replace(run, low=low, count=high - low, start=run.start + low - run.low)


def _name(name: str, prefix: str) -> str:
    """A tensor's name in the full model, for files with older names or of a bare model."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    return name if name.startswith(("lm_head.", "cls.")) else prefix + name
