"""A ZeRO checkpoint as a directory that transformers loads: weights, configuration, tokenizer.

Shards stay mapped from disk and tensors pass one at a time, so the memory needed is that of the
largest one, whatever the size of the model.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
import tokenizers.processors
import torch
from pydantic import TypeAdapter, ValidationError

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.boxes import Shape, numel
from lag_megatron.checkpoint.hf_architecture import Architecture, architecture_of
from lag_megatron.checkpoint.integrity import require_sound
from lag_megatron.checkpoint.names import layers_in
from lag_megatron.checkpoint.safetensors_write import SafetensorsWriter
from lag_megatron.checkpoint.tensor_map import Heads, Row, expand, shape_of, to_transformers
from lag_megatron.checkpoint.whole import WholeTensors
from lag_megatron.checkpoint.zero import ZeroCheckpoint
from lag_megatron.config import ModelConfig
from lag_megatron.errors import CheckpointError
from lag_megatron.files import flush_to_disk

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """A ``tokenizer.json`` and the id of the token that ends a document."""

    path: Path
    end_id: int

    def load(self) -> tokenizers.Tokenizer:
        """The tokenizer, adding no tokens of its own: training text is encoded without any."""
        tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        if tokenizer.num_special_tokens_to_add(False):
            tokenizer.post_processor = None
        return tokenizer


def export_to_transformers(
    checkpoint: ZeroCheckpoint,
    target: Path,
    *,
    tokenizer: TokenizerFile | None = None,
    dtype: Precision = "fp32",
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint as a directory of transformers, whole or not at all.

    Args:
        checkpoint: of any ZeRO stage, world size and tensor-parallel size.
        target: the directory to come; it must not exist.
        tokenizer: written beside the weights; rows of the vocabulary beyond it, which are padding,
            are left out.  Without one all rows are kept.
        dtype: of the weights, converted from the fp32 masters.
        max_shard_size: bytes of a file, or a text like ``5GB``.

    Raises:
        ConfigError: if no architecture of transformers computes what the model computes.
        CheckpointError: if the checkpoint is damaged or not one of ours, if the target exists or
            cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{target}: exists already. Name another directory, or remove it.")
    export = Export(checkpoint, tokenizer)
    export.check()
    draft = commit.temporary(target)
    try:
        commit.remove(draft)
        draft.mkdir(parents=True)
        size = sum(map(numel, export.shapes.values())) * DTYPES[dtype].itemsize
        commit.require_space(draft, needed=size, what="the exported model")
        export.write(draft, dtype=dtype, max_shard_size=max_shard_size)
        for path in (*draft.iterdir(), draft):
            flush_to_disk(path)
        os.rename(draft, target)
        flush_to_disk(target.parent)
    except OSError as error:
        commit.remove(draft)
        raise CheckpointError(
            f"{error.filename or target}: cannot write there: {error.strerror or error}. "
            "Name another directory."
        ) from None
    except BaseException:
        commit.remove(draft)
        raise


@dataclass(frozen=True)
class Export:
    """Everything about an export is known before a tensor is read."""

    checkpoint: ZeroCheckpoint
    tokenizer: TokenizerFile | None

    @cached_property
    def model(self) -> ModelConfig:
        """The model's shape as the checkpoint tells it.

        Raises:
            CheckpointError: if it does not.
        """
        tree = self.checkpoint.client_state.get("model")
        try:
            return TypeAdapter(ModelConfig).validate_python(tree)
        except ValidationError as error:
            raise CheckpointError(
                f"{self.checkpoint.path}: does not say what model it is "
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
        (rows, _) = self.whole.shapes["embedding.word_embeddings.weight"]
        if self.tokenizer is None:
            return rows
        known = max(self.tokenizer.load().get_vocab(with_added_tokens=True).values()) + 1
        if known > rows:
            raise CheckpointError(
                f"{self.tokenizer.path}: has {known} tokens, but the model of "
                f"{self.checkpoint.path} only {rows}. Give the tokenizer that it was trained with."
            )
        return known

    @cached_property
    def whole(self) -> WholeTensors:
        """What is read."""
        return WholeTensors(self.checkpoint)

    @cached_property
    def num_layers(self) -> int:
        """Layers there are, which growth may have made more than the configuration began with."""
        return len(layers_in(self.whole.shapes))

    @cached_property
    def rows(self) -> Sequence[Row]:
        """One for each tensor of the checkpoint.

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
        expected, found = {row.megatron for row in rows}, set(self.whole.shapes)
        for names, what in ((expected - found, "lacks"), (found - expected, "also has")):
            if names:
                raise CheckpointError(
                    f"{self.checkpoint.path}: {what} {sorted(names)[0]} ({len(names)} tensors), "
                    f"so it is not what its configuration says: {self.architecture.name}."
                )
        return rows

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor that is written, by its name in transformers."""
        shapes: dict[str, Shape] = {}
        for row in self.rows:
            whole = self.whole.shapes[row.megatron]
            if row.kind == "vocabulary":
                whole = (self.vocab_size, *whole[1:])
            shapes.update(zip(row.transformers, shape_of(row, whole, self.heads), strict=True))
        return shapes

    def check(self) -> None:
        """Refuse what cannot be exported, before anything is written."""
        self.shapes  # noqa: B018  # all of the above
        self.checkpoint.check_every_file()
        require_sound(self.checkpoint.path)

    def write(self, folder: Path, *, dtype: Precision, max_shard_size: int | str) -> None:
        """Fill a folder."""
        self._write_settings(folder, dtype)
        writer = SafetensorsWriter(
            folder, self.shapes, dtype=DTYPES[dtype], max_shard_size=max_shard_size
        )
        for row in self.rows:
            whole = self.whole.read(row.megatron)
            if row.kind == "vocabulary":
                whole = whole[: self.vocab_size]
            for name, tensor in zip(
                row.transformers, to_transformers(row, whole, self.heads), strict=True
            ):
                writer.write(name, tensor)

    def _write_settings(self, folder: Path, dtype: Precision) -> None:
        import transformers  # seconds; what only describes a checkpoint does without

        end_id = None if self.tokenizer is None else self.tokenizer.end_id
        is_decoder = self.model.family == "gpt"
        special: dict[str, Any] = {"bos_token_id": end_id, "eos_token_id": end_id}
        if not is_decoder:
            special = {}
        config = transformers.AutoConfig.for_model(
            self.architecture.model_type,
            **self.architecture.settings(self.model, self.num_layers),
            **special,
            architectures=[self.architecture.name],
            vocab_size=self.vocab_size,
            initializer_range=self.model.init_std,
            tie_word_embeddings=self.model.tied_embeddings,
            dtype=str(DTYPES[dtype]).removeprefix("torch."),
        )
        config.save_pretrained(folder)
        if is_decoder:
            transformers.GenerationConfig(**special).save_pretrained(folder)
        if self.tokenizer is not None:
            backend = self.tokenizer.load()
            end = backend.id_to_token(self.tokenizer.end_id)
            names = {"bos_token": end, "eos_token": end} if is_decoder else _for_bert(backend)
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=backend,
                **names,
                model_max_length=self.model.seq_length,
                clean_up_tokenization_spaces=False,
            ).save_pretrained(folder)


def _for_bert(backend: tokenizers.Tokenizer) -> dict[str, str]:
    """The names of BERT's tokens that a tokenizer has; it now puts [CLS] and [SEP] around text."""
    known = {name: f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")}
    known = {name: token for name, token in known.items() if backend.token_to_id(token) is not None}
    if {"cls", "sep"} <= known.keys():
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
        )
    known.setdefault("pad", known.get("sep", ""))
    return {f"{name}_token": token for name, token in known.items() if token}
