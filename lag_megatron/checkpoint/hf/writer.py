"""A training state as a directory that transformers loads: weights, configuration, tokenizer."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from lag_megatron.checkpoint.families.layer_stack import count_layers
from lag_megatron.checkpoint.hf.architecture import Architecture, architecture_of
from lag_megatron.checkpoint.hf.safetensors_writer import INDEX, SafetensorsFile, lay_out
from lag_megatron.checkpoint.hf.tensor_map import (
    Heads,
    TensorMapping,
    expand,
    row_runs,
    transformers_shapes,
)
from lag_megatron.checkpoint.hf.tokenizer import TokenizerFile, save_transformers_tokenizer
from lag_megatron.checkpoint.state.box import Shape, numel
from lag_megatron.checkpoint.state.spec import DTYPES
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.checkpoint.writer.file_writer import Span, WriteContext, write_spans
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.config import ModelConfig
from lag_megatron.errors import CheckpointError

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Export:
    """Everything about an export is known before a tensor is read.

    Attributes:
        state: what is written.
        tokenizer: written beside the weights.
        dtype: of the weights, converted from the fp32 masters.
        max_shard_size: bytes of a file, or a text like ``5GB``.
        carried: files of a tokenizer to copy where none is made.
        vocabulary: rows of the vocabulary to keep, the others being padding; by default as many as
            the tokenizer has tokens, and without one those of the model that was imported, or all.
    """

    state: UnshardedState
    tokenizer: TokenizerFile | None = None
    dtype: Precision = "fp32"
    max_shard_size: int | str = "5GB"
    carried: Sequence[Path] = ()
    vocabulary: int | None = None

    def order(self, target: Path, *, about: Mapping[str, Any]) -> WriteJob:
        """What has to be written as the directory ``target``.

        Raises:
            ConfigError: if no architecture of transformers computes what the model computes.
            CheckpointError: if the state does not say what model it is, or is another, or if the
                tokenizer has more tokens than it.
        """
        shapes = self.shapes
        try:
            files, index = lay_out(
                shapes, dtype=DTYPES[self.dtype], max_shard_size=self.max_shard_size
            )
        except ValueError as error:
            raise CheckpointError(f"--max-shard-size {self.max_shard_size}: {error}") from None
        return WriteJob(
            target=target,
            parts=[
                Part("settings", lambda folder, _: self._write_settings(folder, index)),
                *(Part(file.name, partial(self._write_file, file)) for file in files),
            ],
            about={
                **about,
                "written_as": "hf",
                "dtype": self.dtype,
                "vocabulary": self.vocab_size,
                "weights": [file.name for file in files],
                "tokenizer": [manifest.file_checksum(file) for file in self._tokenizer_files],
            },
            needed=sum(map(numel, self.shapes.values())) * DTYPES[self.dtype].itemsize,
            what="the exported model",
            check=partial(self.state.check, VerifyScope(states=("fp32",))),
            pointer=None,
        )

    @property
    def _tokenizer_files(self) -> Sequence[Path]:
        return self.carried if self.tokenizer is None else [self.tokenizer.path]

    @cached_property
    def model(self) -> ModelConfig:
        """The model's shape as the state tells it.

        Raises:
            CheckpointError: if it does not.
        """
        tree = self.state.draft.entries["lag"].get("model")
        try:
            return TypeAdapter(ModelConfig).validate_python(tree)
        except ValidationError as error:
            raise CheckpointError(
                f"{self.state.path}: does not say what model it is "
                f"({error.errors()[0]['msg']}). Only checkpoints of this program can be exported."
            ) from None

    @cached_property
    def architecture(self) -> Architecture:
        """What it becomes."""
        return architecture_of(self.model)

    @cached_property
    def heads(self) -> Heads:
        """How attention is cut."""
        model = self.model
        return Heads(model.num_query_groups, model.hidden_size // model.num_attention_heads)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that are kept.

        Raises:
            CheckpointError: if the tokenizer has more tokens than the model.
        """
        (rows, _) = self.state.shapes["embedding.word_embeddings.weight"]
        wanted = self.vocabulary
        if self.tokenizer is not None:
            known = max(self.tokenizer.load().get_vocab(with_added_tokens=True).values()) + 1
            wanted = known if wanted is None else wanted
            if known > rows:
                raise CheckpointError(
                    f"{self.tokenizer.path}: has {known} tokens, but the model of "
                    f"{self.state.path} only {rows}. Give the tokenizer that it was trained with."
                )
        if wanted is None:
            wanted = self.state.draft.entries["lag"].get("vocabulary")
        if wanted is not None and not 0 < wanted <= rows:
            raise CheckpointError(f"{self.state.path}: has {rows} rows of tokens, not {wanted}.")
        return rows if wanted is None else wanted

    @cached_property
    def num_layers(self) -> int:
        """Layers there are, which growth may have made more than the configuration began with."""
        return count_layers(self.state.shapes)

    @cached_property
    def rows(self) -> Sequence[TensorMapping]:
        """One for each tensor of the state.

        Raises:
            CheckpointError: if there are others, or some are missing.
        """
        rows = list(
            expand(
                self.architecture.rows,
                num_layers=self.num_layers,
                bias=self.model.bias,
                tied_embeddings=self.model.tied_embeddings,
            )
        )
        expected, found = {row.megatron for row in rows}, set(self.state.shapes)
        for names, what in ((expected - found, "lacks"), (found - expected, "also has")):
            if names:
                raise CheckpointError(
                    f"{self.state.path}: {what} {sorted(names)[0]} ({len(names)} tensors), "
                    f"so it is not what its configuration says: {self.architecture.name}."
                )
        return rows

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor that is written, by its name in transformers."""
        shapes: dict[str, Shape] = {}
        for row in self.rows:
            whole = self._kept(row)
            shapes.update(
                zip(row.transformers, transformers_shapes(row, whole, self.heads), strict=True)
            )
        return shapes

    def _kept(self, row: TensorMapping) -> Shape:
        """Shape of Megatron's tensor without padding."""
        whole = self.state.shapes[row.megatron]
        return (self.vocab_size, *whole[1:]) if row.kind == "vocabulary" else whole

    @cached_property
    def _places(self) -> dict[str, tuple[TensorMapping, int]]:
        """By name in transformers: the row, and which of its parts the tensor is."""
        return {
            name: (row, part) for row in self.rows for part, name in enumerate(row.transformers)
        }

    def _write_file(
        self, file: SafetensorsFile, folder: Path, crew: WriteContext
    ) -> dict[str, Any]:
        spans = [self._span(name, begin, file.dtype) for name, begin in file.create(folder).items()]
        entry = write_spans(folder / file.name, spans, self.state.fill, crew)
        crew.flush(folder / file.name)
        return {file.name: entry}

    def _span(self, name: str, begin: int, dtype: torch.dtype) -> Span:
        """What a tensor of transformers is made of."""
        row, part = self._places[name]
        kept = self._kept(row)
        width = numel(kept[1:])
        parts = [run for run in row_runs(row, kept[0], self.heads) if run.part == part]
        parts.sort(key=lambda run: run.start)
        found = [(run.low * width, run.count * width) for run in parts]
        is_turned = row.transposed and len(kept) == 2
        region = self.state.region(row.megatron, "fp32", *found)
        return Span(begin, dtype, region, width if is_turned else 0)

    def _write_settings(self, folder: Path, index: str | None) -> dict[str, Any]:
        self._save_config(folder)
        if self.tokenizer is not None:
            save_transformers_tokenizer(self.tokenizer, folder, self.model)
        for file in self.carried if self.tokenizer is None else ():
            shutil.copy(file, folder)
        if index is not None:
            (folder / INDEX).write_text(index, encoding="utf-8")
        # Weights are being written beside.
        written = [p for p in folder.iterdir() if p.suffix != ".safetensors" and p.name[0] != "."]
        return {path.name: manifest.file_entry(path) for path in written}

    def _save_config(self, folder: Path) -> None:
        import transformers  # seconds; what only describes a checkpoint does without

        is_decoder = self.model.family == "gpt"
        special: dict[str, Any] = dict(self.state.draft.entries["lag"].get("special_tokens") or {})
        if is_decoder and (self.tokenizer is not None or not special):
            end_id = None if self.tokenizer is None else self.tokenizer.end_id
            special = {"bos_token_id": end_id, "eos_token_id": end_id}
        config = transformers.AutoConfig.for_model(
            self.architecture.model_type,
            **self.architecture.settings(self.model, self.num_layers),
            **special,
            architectures=[self.architecture.name],
            vocab_size=self.vocab_size,
            initializer_range=self.model.init_std,
            tie_word_embeddings=self.model.tied_embeddings,
            dtype=str(DTYPES[self.dtype]).removeprefix("torch."),
        )
        config.save_pretrained(folder)
        if is_decoder:
            transformers.GenerationConfig(**special).save_pretrained(folder)
