"""A model of transformers under Megatron's names: which rows of which tensors a parameter is."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.families.roles import megatron_role
from lag_megatron.checkpoint.hf.architecture import ARCHITECTURES, Architecture, read_config
from lag_megatron.checkpoint.hf.tensor_map import (
    Heads,
    RowRun,
    TensorMapping,
    expand,
    row_runs,
    transformers_shapes,
)
from lag_megatron.checkpoint.hf.tensors import FLOAT_DTYPES, LazyTensor
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.config import ModelConfig, padded_vocab_size
from lag_megatron.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What a ``config.json`` says.

    Attributes:
        architecture: of transformers.
        model: the same model here; its vocabulary may be padded.
        tokens: rows of the vocabulary without padding.
        special_tokens: the ``*_token_id`` entries.
    """

    architecture: Architecture
    model: ModelConfig
    tokens: int
    special_tokens: Mapping[str, Any]


def read_model(path: Path, *, vocab_size: int | None = None) -> ModelSettings:
    """The model of a directory's ``config.json``.

    Args:
        path: the directory.
        vocab_size: rows of the vocabulary; the default is the number of tokens rounded up to a
            multiple of 128.

    Raises:
        CheckpointError: if there is no ``config.json``, or it cannot be read.
        ConfigError: if the model is not supported.
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
    return ModelSettings(architecture, model, tokens, _special_tokens(path, settings))


def _special_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens; a negative one stands for none in models of early Llamas."""
    found = {key: value for key, value in settings.items() if key.endswith("_token_id")}
    for key, value in found.items():
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(number) is int for number in ids):
            raise ConfigError(
                f"{path}: {key} in config.json is {value!r}, expected a whole number, a list of "
                "them, or null. Mend it there."
            )
    return found


@dataclass(frozen=True)
class MappedModel:
    """A model's tensors in transformers, and its parameters in Megatron that they make.

    Attributes:
        path: where they are, for messages.
        settings: of the model.
        tensors: the weights by their names in the whole model.
    """

    path: Path
    settings: ModelSettings
    tensors: Mapping[str, LazyTensor]

    @property
    def architecture(self) -> Architecture:
        """Of transformers."""
        return self.settings.architecture

    @property
    def model(self) -> ModelConfig:
        """The same model here."""
        return self.settings.model

    @property
    def tokens(self) -> int:
        """Rows of the vocabulary without padding."""
        return self.settings.tokens

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
        tied = {other for other, _ in self.tied}
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

    @property
    def left_out(self) -> list[str]:
        """Tensors that are not the model's, without their layers."""
        return sorted({n.partition(".layer.")[0] for n in self.tensors if self._is_ignored(n)})

    def _is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.architecture.ignored)

    @cached_property
    def tied(self) -> list[tuple[str, str]]:
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

    def shape(self, mapping: TensorMapping) -> Shape:
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

    def read(self, name: str, start: int, length: int, tensors: Mapping[str, LazyTensor]) -> Tensor:
        """Elements ``start .. start + length`` of a Megatron parameter.

        Args:
            name: of the parameter.
            start: the first element.
            length: number of elements.
            tensors: what they are taken from: weights, or one of their moments.
        """
        mapping = self.mappings[name]
        width = numel(self.shape(mapping)[1:])
        first, last = start // width, -(-(start + length) // width)
        found = list(self._rows(tensors, mapping, first, last))
        values = found[0] if len(found) == 1 else torch.cat(found)
        begin = start - first * width
        return values.reshape(-1)[begin : begin + length]

    def _rows(
        self, tensors: Mapping[str, LazyTensor], mapping: TensorMapping, first: int, last: int
    ) -> Iterator[Tensor]:
        """Rows ``first .. last`` of Megatron's parameter, in several tensors."""
        known = self.tokens if mapping.kind == "vocabulary" else last
        for run in _within(
            row_runs(mapping, self._full_shape(mapping)[0], self.heads), first, last
        ):
            stored = tensors[mapping.transformers[run.part]]
            yield stored.rows(run.start, run.start + run.count, transposed=mapping.transposed)
        if last > known:
            (name,) = mapping.transformers
            padding = tensors[name].rows(known - 1, known)
            yield padding.expand(last - max(first, known), *padding.shape[1:])


def _within(found: Sequence[RowRun], first: int, last: int) -> Iterator[RowRun]:
    """The parts of runs within rows ``first .. last``."""
    for run in found:
        low, high = max(run.low, first), min(run.low + run.count, last)
        if low < high:
            yield replace(run, low=low, count=high - low, start=run.start + low - run.low)
