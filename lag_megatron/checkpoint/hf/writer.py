"""Exporting a training state as a directory that transformers loads."""

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
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.file_writer import write_spans
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.checkpoint.writer.pieces import Span
from lag_megatron.config import ModelConfig
from lag_megatron.config.validation.messages import describe_errors
from lag_megatron.errors import CheckpointError

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Export:
    """An export, checked before a tensor is read.

    Attributes:
        state: the training state.
        tokenizer: written beside the weights.
        dtype: of the weights, converted from the fp32 masters.
        max_shard_size: bytes of a file, or a text like ``5GB``.
        carried: tokenizer files to copy if ``tokenizer`` is None.
        vocabulary: rows of the vocabulary to keep, the others being padding.  The default is the
            tokenizer's number of tokens, else that of the imported model, else all rows.
    """

    state: UnshardedState
    tokenizer: TokenizerFile | None = None
    dtype: Precision = "fp32"
    max_shard_size: int | str = "5GB"
    carried: Sequence[Path] = ()
    vocabulary: int | None = None

    def job(self, target: Path, *, metadata: Mapping[str, Any]) -> WriteJob:
        """The job that writes the directory ``target``.

        Args:
            target: the directory to write.
            metadata: entries of the manifest.

        Raises:
            ConfigError: if no transformers architecture computes the same function.
            CheckpointError: if the state lacks its model configuration or does not match it, or if
                the tokenizer has more tokens than the model.
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
            source=self.state.path,
            parts=[
                Part("settings", lambda folder, _: self._write_settings(folder, index)),
                *(Part(file.name, partial(self._write_file, file)) for file in files),
            ],
            metadata={
                **metadata,
                "written_as": "hf",
                "dtype": self.dtype,
                "vocabulary": self.vocab_size,
                "weights": [file.name for file in files],
                "tokenizer": [manifest.file_checksum(file) for file in self._tokenizer_files],
            },
            needed=sum(map(numel, self.shapes.values())) * DTYPES[self.dtype].itemsize,
            title="the exported model",
            check=partial(self.state.check, VerifyScope(states=("fp32",))),
            pointer=None,
        )

    @property
    def _tokenizer_files(self) -> Sequence[Path]:
        return self.carried if self.tokenizer is None else [self.tokenizer.path]

    @cached_property
    def model(self) -> ModelConfig:
        """The model configuration in the state.

        Raises:
            CheckpointError: if there is none.
        """
        tree = self.state.spec.entries["lag"].get("model")
        try:
            return TypeAdapter(ModelConfig).validate_python(tree)
        except ValidationError as error:
            found = "; ".join(describe_errors(error, tree, schema=ModelConfig)[:3])
            raise CheckpointError(
                f"{self.state.path}: does not say what model it is ({found}). Only checkpoints of "
                "this program can be exported."
            ) from None

    @cached_property
    def architecture(self) -> Architecture:
        """The transformers architecture of the model."""
        return architecture_of(self.model)

    @cached_property
    def heads(self) -> Heads:
        """The model's query groups and head size."""
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
            wanted = self.state.spec.entries["lag"].get("vocabulary")
        if wanted is not None and not 0 < wanted <= rows:
            raise CheckpointError(f"{self.state.path}: has {rows} rows of tokens, not {wanted}.")
        return rows if wanted is None else wanted

    @cached_property
    def num_layers(self) -> int:
        """Layers of the state; after growth more than the configuration has."""
        return count_layers(self.state.shapes)

    @cached_property
    def mappings(self) -> Sequence[TensorMapping]:
        """The mapping of each tensor of the state.

        Raises:
            CheckpointError: if the state has other tensors, or some are missing.
        """
        mappings = list(
            expand(
                self.architecture.mappings,
                num_layers=self.num_layers,
                bias=self.model.bias,
                tied_embeddings=self.model.tied_embeddings,
            )
        )
        expected, found = {mapping.megatron for mapping in mappings}, set(self.state.shapes)
        for names, what in ((expected - found, "lacks"), (found - expected, "also has")):
            if names:
                raise CheckpointError(
                    f"{self.state.path}: {what} {sorted(names)[0]} ({len(names)} tensors), "
                    f"so it is not what its configuration says: {self.architecture.name}."
                )
        return mappings

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all written tensors, by name in transformers."""
        shapes: dict[str, Shape] = {}
        for mapping in self.mappings:
            full = self._kept(mapping)
            shapes.update(
                zip(
                    mapping.transformers,
                    transformers_shapes(mapping, full, self.heads),
                    strict=True,
                )
            )
        return shapes

    def _kept(self, mapping: TensorMapping) -> Shape:
        """Shape of Megatron's tensor without padding."""
        full = self.state.shapes[mapping.megatron]
        return (self.vocab_size, *full[1:]) if mapping.kind == "vocabulary" else full

    @cached_property
    def _places(self) -> dict[str, tuple[TensorMapping, int]]:
        """The mapping of each name in transformers, and which of its parts the tensor is."""
        return {
            name: (mapping, part)
            for mapping in self.mappings
            for part, name in enumerate(mapping.transformers)
        }

    def _write_file(
        self, file: SafetensorsFile, folder: Path, context: WriteContext
    ) -> dict[str, Any]:
        spans = [self._span(name, begin, file.dtype) for name, begin in file.create(folder).items()]
        entry = write_spans(folder / file.name, spans, self.state.fill, context)
        context.flush(folder / file.name)
        return {file.name: entry}

    def _span(self, name: str, begin: int, dtype: torch.dtype) -> Span:
        """The bytes of a tensor in the file, and the runs of elements they are made of."""
        mapping, part = self._places[name]
        kept = self._kept(mapping)
        width = numel(kept[1:])
        parts = [run for run in row_runs(mapping, kept[0], self.heads) if run.part == part]
        parts.sort(key=lambda run: run.start)
        found = [(run.low * width, run.count * width) for run in parts]
        is_turned = mapping.transposed and len(kept) == 2
        region = self.state.region(mapping.megatron, "fp32", *found)
        return Span(begin, dtype, region, width if is_turned else 0)

    def _write_settings(self, folder: Path, index: str | None) -> dict[str, Any]:
        self._save_config(folder)
        if self.tokenizer is not None:
            save_transformers_tokenizer(
                self.tokenizer,
                folder,
                is_decoder=self.model.family == "gpt",
                window=self.model.seq_length,
            )
        for file in self.carried if self.tokenizer is None else ():
            shutil.copy(file, folder)
        if index is not None:
            (folder / INDEX).write_text(index, encoding="utf-8")
        # Other threads are writing the weights into the same directory.
        written = [p for p in folder.iterdir() if p.suffix != ".safetensors" and p.name[0] != "."]
        return {path.name: manifest.file_entry(path) for path in written}

    def _save_config(self, folder: Path) -> None:
        import transformers  # takes seconds, which only describing a checkpoint should not

        is_decoder = self.model.family == "gpt"
        special: dict[str, Any] = dict(self.state.spec.entries["lag"].get("special_tokens") or {})
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
            # It refuses a negative id, which config.json may have for none.
            ids = {k: v for k, v in special.items() if not isinstance(v, int) or v >= 0}
            transformers.GenerationConfig(**ids).save_pretrained(folder)
