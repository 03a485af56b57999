"""Importing a transformers directory: weights become fp32 masters, and moments are 0."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.hf.mapped_model import MappedModel, ModelSettings, read_model
from lag_megatron.checkpoint.hf.tensors import open_tensors, with_whole_names
from lag_megatron.checkpoint.hf.weight_files import weight_notes
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
from lag_megatron.errors import CheckpointError


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
    return _Import(path, read_model(path, vocab_size=vocab_size)).source


@dataclass(frozen=True)
class _Import:
    """An import, checked before a tensor is read."""

    path: Path
    settings: ModelSettings

    @cached_property
    def mapped(self) -> MappedModel:
        """The directory's tensors under Megatron's names."""
        prefix = self.settings.architecture.prefix
        tensors = with_whole_names(self.path, open_tensors(self.path), prefix)
        return MappedModel(self.path, self.settings, tensors)

    @property
    def source(self) -> UnshardedCheckpoint:
        """The checkpoint as growth and writers read it."""
        mapped, known = self.mapped, self.settings
        groups = decay_groups({name: mapped.shape(m) for name, m in mapped.mappings.items()})
        state = default_client_state(known.model, groups)
        state |= {"vocabulary": known.tokens, "special_tokens": known.special_tokens}
        left = f"left out, not of {known.architecture.name}: {', '.join(mapped.left_out)}"
        return UnshardedCheckpoint(
            path=self.path,
            header=default_header(module_keys(list(mapped.mappings)), client_state=state, step=0),
            groups=groups,
            group_states=default_group_states(groups),
            read=self.read,
            check=self.check,
            notes=[
                *([left] if mapped.left_out else []),
                *weight_notes(self.path),
                SETTINGS_NOTE,
            ],
        )

    def read(self, name: str, state: State, start: int, length: int) -> Tensor:
        """Elements ``start .. start + length`` of a Megatron parameter; moments are 0."""
        if state != "fp32":
            return torch.zeros(length)
        return self.mapped.read(name, start, length, self.mapped.tensors)

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
        for other, owner in scope.share(self.mapped.tied):
            if not self.mapped.tensors[other].equals(self.mapped.tensors[owner]):
                raise CheckpointError(
                    f"{self.path}: {other} differs from {owner}, but config.json says that they "
                    "are tied. Set tie_word_embeddings to false, or leave one of them out."
                )
