"""Writing a training state as a distributed checkpoint of Megatron-Core (``torch_dist``).

Weights have the names of ``sharded_state_dict``, with layers stacked or numbered; the optimizer
has the ``fully_reshardable`` form: masters and moments in the shapes of the weights.  Each tensor
of a parameter is a file of its own, which a grown checkpoint can hard-link.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.families.layer_stack import count_layers
from lag_megatron.checkpoint.families.roles import foreign_name
from lag_megatron.checkpoint.megatron.dcp_metadata import METADATA, StorageLocation, StoredTensor
from lag_megatron.checkpoint.megatron.dcp_metadata_writer import write_metadata
from lag_megatron.checkpoint.megatron.dist_checkpoint import COMMON, CONFIG
from lag_megatron.checkpoint.megatron.param_names import Stacked, stored_as
from lag_megatron.checkpoint.state.box import Box, numel
from lag_megatron.checkpoint.state.layout import STATES, State
from lag_megatron.checkpoint.state.spec import DTYPES, PlaceholderTensors
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import EVERYTHING
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.checkpoint.zero.writer import write_objects
from lag_megatron.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
# Prefixes of the states of Megatron's distributed optimizer.
STORED_STATES: Mapping[State, str] = {
    "fp32": "optimizer.state.param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
_SHARDING = "fully_reshardable"
_EXTRA = "_extra_state"
_NOTHING = "__0_nothing.distcp"


def megatron_job(
    state: UnshardedState,
    target: Path,
    *,
    precision: str,
    metadata: Mapping[str, Any],
    stacked: bool = True,
) -> WriteJob:
    """The job that writes the directory ``target``, an ``iter_0000000``.

    Args:
        state: the training state.
        target: the directory to write.
        precision: of the weights; the optimizer's states are fp32.
        metadata: entries of the manifest.
        stacked: whether layers are stacked into one tensor, or numbered, which Megatron-Core reads
            under ``non_homogeneous_layers``.

    Raises:
        CheckpointError: if the format cannot hold the state.
    """
    if state.spec.layout.optimizer != "adamw" or state.spec.frozen.shapes:
        raise CheckpointError(
            f"{state.path}: Megatron's distributed optimizer keeps Adam's moments of every "
            "parameter, and this state has other ones. Convert to zero."
        )
    if foreign := foreign_name(state.shapes):
        raise CheckpointError(
            f"{state.path}: {foreign} is no parameter of Megatron-Core's GPT or BERT, so Megatron "
            "could not load it. Convert to universal or zero, which keep the names."
        )
    stored = _CheckpointFiles(state, DTYPES[precision], stacked=stacked)
    size = sum(map(numel, state.shapes.values()))
    return WriteJob(
        target=target,
        source=state.path,
        parts=[Part(name, partial(stored.write_parameter, name)) for name in state.shapes],
        metadata={
            **metadata,
            "written_as": "megatron",
            "precision": precision,
            "layers": "stacked" if stacked else "numbered",
        },
        needed=size * (4 * len(STATES) + DTYPES[precision].itemsize),
        title="Megatron's checkpoint",
        check=partial(state.check, EVERYTHING),
        finish=stored.write_rest,
        pointer=TRACKER,
        pointer_text=str(state.spec.template.step),
    )


class _CheckpointFiles:
    """The files of a checkpoint and their entries in its metadata."""

    def __init__(self, state: UnshardedState, weights: torch.dtype, *, stacked: bool) -> None:
        self._state, self._weights, self._stacked = state, weights, stacked
        self._layers = count_layers(state.shapes)
        # Numbered, since names may be longer than file systems allow.
        self._numbers = {name: number for number, name in enumerate(state.shapes)}

    def write_parameter(self, name: str, folder: Path, context: WriteContext) -> dict[str, Any]:
        """Write the files of a parameter's weights, masters and moments."""
        entries: dict[str, Any] = {}
        for prefix, kept, dtype in self._kinds():
            placeholders, file = PlaceholderTensors(), self._file(name, prefix)
            objects = placeholders(self._state.region(name, kept), self._box(name).shape, dtype)
            entries[file] = write_objects(
                folder / file, objects, placeholders, self._state.fill, context
            )
        return entries

    def write_rest(self, folder: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        """Write the files without parameters: metadata and settings."""
        torch.save([None], folder / _NOTHING)  # one entry for each object, as Megatron groups them
        torch.save(self._common(), folder / COMMON)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        config |= {"common_backend": "torch", "common_backend_version": 1}
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        lengths = {name: entry["size"] for name, entry in files.items()}
        nothing = StorageLocation(
            _NOTHING, 0, (folder / _NOTHING).stat().st_size, transformed=False
        )
        write_metadata(folder, self._tensors(lengths), dict.fromkeys(self._empty(), nothing))
        return {n: manifest.file_entry(folder / n) for n in (_NOTHING, COMMON, CONFIG, METADATA)}

    def _kinds(self) -> Iterator[tuple[str, State, torch.dtype]]:
        """Name prefix, state and precision of each tensor that is stored for a parameter."""
        yield "", "fp32", self._weights
        for kept, prefix in STORED_STATES.items():
            yield prefix, kept, torch.float32

    def _file(self, name: str, prefix: str) -> str:
        kind = [prefix for prefix, _, _ in self._kinds()].index(prefix)
        return f"__0_{self._numbers[name] * 4 + kind}.distcp"

    def _where(self, name: str) -> Stacked:
        return stored_as(name, stacked=self._stacked)

    def _box(self, name: str) -> Box:
        """A parameter's box in its stored tensor."""
        shape, layer = self._state.shapes[name], self._where(name).layer
        low = tuple(0 for _ in shape)
        return Box(low, shape) if layer is None else Box((layer, *low), (1, *shape))

    def _tensors(self, lengths: Mapping[str, int]) -> dict[str, StoredTensor]:
        """Every stored tensor with its boxes, from the lengths of the files."""
        boxes: dict[str, list[tuple[Box, StorageLocation]]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name in self._state.shapes:
            for prefix, _, dtype in self._kinds():
                file, key = self._file(name, prefix), prefix + self._where(name).key
                place = StorageLocation(file, 0, lengths[file], transformed=False)
                boxes.setdefault(key, []).append((self._box(name), place))
                dtypes[key] = dtype
        found = {}
        for key, listed in boxes.items():
            shape = listed[0][0].shape
            is_layers = self._stacked and "layers." in key
            full_shape = (self._layers, *shape[1:]) if is_layers else shape
            found[key] = StoredTensor(dtypes[key], full_shape, tuple(listed))
        return found

    def _empty(self) -> Iterator[str]:
        """Names of the extra state of Megatron's linear layers, which is empty."""
        for name in self._state.spec.names:
            if name.endswith(_EXTRA) and not name.startswith("output_layer."):
                where = self._where(name)
                layers = self._layers if where.layer is not None else 1
                yield f"{where.key}/shard_{where.layer or 0}_{layers}"
            elif name.startswith("output_layer.") and name.endswith(_EXTRA):
                yield f"{name}/shard_0_1"

    def _scheduler(self) -> dict[str, Any]:
        """Progress of the schedule in samples; Megatron's command line gives its shape."""
        spec = self._state.spec
        samples = int(spec.template.header.get("global_samples") or 0)
        settings = spec.groups[0].settings
        rate, decay = float(settings.get("lr", 0.0)), float(settings.get("weight_decay", 0.0))
        return {
            "max_lr": rate, "min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_steps": samples,
            "lr_decay_style": "constant", "num_steps": samples, "start_wd": decay,
            "end_wd": decay, "wd_incr_steps": samples, "wd_incr_style": "constant",
        }  # fmt: skip

    def _common(self) -> dict[str, Any]:
        """The values that are not tensors, as Megatron-LM stores them."""
        spec = self._state.spec
        groups = [
            # The last four identify a group in Megatron.
            {**group.settings, "step": float(group.counters["step"]),
             "wd_mult": 1.0 if group.settings.get("weight_decay") else 0.0, "lr_mult": 1.0,
             "is_expert_parallel": False, "is_decoupled_lr": False}
            for group in spec.groups
        ]  # fmt: skip
        return {
            "checkpoint_version": 3.0,
            "iteration": spec.template.step,
            "optimizer": {
                "optimizer": {"param_groups": groups},
                "param_state_sharding_type": _SHARDING,
            },
            "opt_param_scheduler": self._scheduler(),
            "content_metadata": {
                "distrib_optim_sharding_type": _SHARDING,
                **({} if self._stacked else {"non_homogeneous_layers": True}),
            },
            "lag": spec.entries["lag"],
        }
