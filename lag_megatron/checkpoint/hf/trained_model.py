"""A model of transformers that was trained under DeepSpeed, under Megatron's names.

Its checkpoint has masters and moments by transformers' names.  What it lacks is the number of
heads, by which Megatron lays out queries, keys and values: ``config.json`` says it, which the
Trainer writes beside the tag.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lag_megatron.checkpoint.families import bert, gpt, llama
from lag_megatron.checkpoint.families.layer_stack import count_layers, largest_stack
from lag_megatron.checkpoint.families.roles import find_roles, foreign_name
from lag_megatron.checkpoint.hf.architecture import ARCHITECTURES
from lag_megatron.checkpoint.hf.mapped_model import MappedModel, ModelSettings, read_model
from lag_megatron.checkpoint.hf.tensors import LazyTensor, with_whole_names
from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.checkpoint.state.deepspeed_defaults import (
    default_client_state,
    default_header,
    module_keys,
)
from lag_megatron.checkpoint.state.layout import STATES, GroupState, ParamGroup, State
from lag_megatron.checkpoint.state.source import UnshardedCheckpoint
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.errors import CheckpointError

_CONFIG = "config.json"
_KNOWN = ", ".join(architecture.name for architecture in ARCHITECTURES)


def with_megatron_names(
    state: UnshardedState, *, vocab_size: int | None = None
) -> UnshardedCheckpoint:
    """The same training state with Megatron's parameters.

    Args:
        state: with the names of a model of transformers.
        vocab_size: rows of the vocabulary; the default is the number of tokens rounded up to a
            multiple of 128.  Rows beyond the tokens repeat the last one, and their moments are its.

    Raises:
        CheckpointError: if there is no ``config.json``, or it describes another model.
        ConfigError: if the model is not supported.
    """
    _require_known(state)
    settings = read_model(_config_folder(state.path), vocab_size=vocab_size)
    layers = count_layers(state.shapes)  # after growth more than the configuration has
    settings = replace(settings, model=replace(settings.model, num_layers=layers))
    return _TrainedModel(state, settings).source


def _require_known(state: UnshardedState) -> None:
    """Check that the names are those of a model of transformers that is mapped here.

    Raises:
        CheckpointError: if they are not.
    """
    family = find_roles(state.shapes, largest_stack(state.shapes)).family
    if family not in (bert.TRANSFORMERS, gpt.TRANSFORMERS, llama.TRANSFORMERS):
        raise CheckpointError(
            f"{state.path}: {foreign_name(state.shapes)} is no parameter of Megatron-Core's GPT or "
            f"BERT, and the model is none of those whose names can be mapped ({_KNOWN}): Megatron "
            "could not load it. Convert to universal or zero, which keep the names."
        )


def _config_folder(path: Path) -> Path:
    """The directory with the model's ``config.json``: the tag's, or the one that holds the tag.

    Raises:
        CheckpointError: if neither has it.
    """
    folders = (path, path.resolve().parent)
    found = next((folder for folder in folders if (folder / _CONFIG).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path}: its parameters have transformers' names, and {folders[1] / _CONFIG}, which "
            "would say the number of heads, is not there: without it Megatron's parameters cannot "
            f'be made. Write it with model.config.save_pretrained("{folders[1]}"), or convert to '
            "universal or zero, which keep the names."
        )
    return found


@dataclass(frozen=True)
class _Values:
    """A tensor's values of one state, which are read when sliced."""

    training: UnshardedState
    name: str
    state: State

    def __getitem__(self, wanted: slice | tuple[slice, slice]) -> Tensor:
        """Rows, or all rows of some columns."""
        shape = self.training.shapes[self.name]
        if isinstance(wanted, tuple):
            rows, (first, last, _) = shape[0], wanted[1].indices(shape[1])
            runs = [(row * shape[1] + first, last - first) for row in range(rows)]
            return self._read(runs, (rows, last - first))
        first, last, _ = wanted.indices(shape[0])
        width = shape[1] if len(shape) > 1 else 1
        return self._read([(first * width, (last - first) * width)], (last - first, *shape[1:]))

    def _read(self, runs: list[tuple[int, int]], shape: Shape) -> Tensor:
        return self.training.read_runs(self.name, self.state, runs).view(shape)


@dataclass(frozen=True)
class _TrainedModel:
    training: UnshardedState
    settings: ModelSettings

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The state's names by those in the whole model."""
        names = {name: name for name in self.training.shapes}
        return with_whole_names(self.training.path, names, self.settings.architecture.prefix)

    @cached_property
    def tensors(self) -> dict[State, dict[str, LazyTensor]]:
        """Tensors of each state by their names in the whole model."""
        path, shapes = self.training.path, self.training.shapes
        return {
            state: {
                whole: LazyTensor(path, shapes[name], "F32", _Values(self.training, name, state))
                for whole, name in self.names.items()
            }
            for state in STATES
        }

    @cached_property
    def mapped(self) -> MappedModel:
        """The weights under Megatron's names."""
        return MappedModel(self.training.path, self.settings, self.tensors["fp32"])

    @property
    def source(self) -> UnshardedCheckpoint:
        """The checkpoint as writers read it."""
        spec, known = self.training.spec, self.settings
        step, header = spec.template.step, spec.template.header
        groups, group_states, untrained = self._groups()
        state: dict[str, Any] = {
            **default_client_state(known.model, groups, step=step),
            **spec.entries["lag"],
            "parameter_groups": [list(group) for group in groups],
            "vocabulary": known.tokens,
            "special_tokens": known.special_tokens,
        }
        keys = module_keys(list(self.mapped.mappings))
        kept = {key: header[key] for key in ("global_samples", "skipped_steps") if key in header}
        return UnshardedCheckpoint(
            path=self.training.path,
            header={**default_header(keys, client_state=state, step=step), **kept},
            groups=groups,
            group_states=group_states,
            read=lambda name, kept, start, length: self.mapped.read(
                name, start, length, self.tensors[kept]
            ),
            untrained=untrained,
            check=self.training.check,
        )

    def _groups(self) -> tuple[list[ParamGroup], list[GroupState], ParamGroup]:
        """Parameter groups with their settings, and parameters that are not trained.

        Raises:
            CheckpointError: if parameters of several groups make one of Megatron's.
        """
        spec, mapped = self.training.spec, self.mapped
        number = {name: n for n, group in enumerate(spec.layout.groups) for name in group}
        listed: list[dict[str, Shape]] = [{} for _ in spec.layout.groups]
        untrained: dict[str, Shape] = {}
        for name, mapping in mapped.mappings.items():
            numbers = {number.get(self.names[whole]) for whole in mapping.transformers}
            if len(numbers) > 1:
                raise CheckpointError(
                    f"{self.training.path}: {', '.join(mapping.transformers)} are one parameter in "
                    "Megatron, but in several groups of the optimizer. Put them into one group."
                )
            (found,) = numbers
            (untrained if found is None else listed[found])[name] = mapped.shape(mapping)
        pairs = [(g, state) for g, state in zip(listed, spec.groups, strict=True) if g]
        return [group for group, _ in pairs], [state for _, state in pairs], untrained
