"""Growing a distributed checkpoint by hard links: only new values are written.

The data files are linked as they are; a duplicated layer is one more entry in ``.metadata`` for the
same bytes.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.families.layer_stack import LayerName
from lag_megatron.checkpoint.megatron import dcp_metadata, dist_checkpoint
from lag_megatron.checkpoint.megatron.dcp_metadata import StorageLocation, StoredTensor
from lag_megatron.checkpoint.megatron.dcp_metadata_writer import write_metadata
from lag_megatron.checkpoint.megatron.param_names import Stacked, parameters_in, stored_as
from lag_megatron.checkpoint.megatron.reader import prefixes_of
from lag_megatron.checkpoint.megatron.writer import TRACKER
from lag_megatron.checkpoint.state.box import Box, numel
from lag_megatron.checkpoint.state.layout import State
from lag_megatron.checkpoint.state.spec import PlaceholderTensors
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import manifest, torch_pickle
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.checkpoint.zero.writer import write_objects
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.conversion import unsharded_state
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.apply.hardlink_universal import hardlink_file, origin_of


def hardlink_dcp(grown: GrownState, target: Path) -> WriteJob:
    """The job that grows a distributed checkpoint: data files are linked, metadata is written.

    Args:
        grown: of a distributed checkpoint, under the topology of one rank without ZeRO.
        target: the directory to write, an ``iter_0000000`` for Megatron.

    Raises:
        PlanError: if a stored box covers several layers, or Megatron's settings cannot be read.
    """
    metadata = _GrownMetadata(grown, unsharded_state(grown))
    return WriteJob(
        target=target,
        source=grown.source.path,
        parts=[
            *(
                Part(f"link {file}", partial(metadata.link_file, file))
                for file in sorted({place.file for place in metadata.old_places()})
            ),
            *(Part(name, partial(metadata.write_new, name)) for name in metadata.new_states),
        ],
        metadata={**grown.metadata, "written_as": "linked"},
        needed=metadata.new_bytes,
        title="what is not linked",
        check=grown.source.require_sound,
        finish=metadata.write_rest,
        pointer=TRACKER if metadata.is_megatron else None,
        pointer_text=_tracked(target),
    )


def _tracked(target: Path) -> str:
    """What Megatron's pointer file holds for a directory: its iteration, or ``release``."""
    number = target.name.removeprefix("iter_")
    return str(int(number)) if number.isdigit() else target.name


@dataclass(frozen=True)
class _GrownMetadata:
    """The files of a grown distributed checkpoint and their entries in its metadata."""

    grown: GrownState
    state: UnshardedState

    @cached_property
    def contents(self) -> dcp_metadata.Contents:
        """The contents of the source."""
        return dcp_metadata.read_metadata(self.grown.source.path)

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron-Core wrote the source, or torch."""
        return dist_checkpoint.is_megatron(self.grown.source.path)

    @cached_property
    def common(self) -> dict[str, Any]:
        """Megatron's settings with the grown number of layers.

        Raises:
            PlanError: if they hold unknown classes.
        """
        found, note = dist_checkpoint.read_common(self.grown.source.path)
        if note:
            raise PlanError(
                f"{self.grown.source.path}: {note}, so its number of layers cannot be changed. "
                "Leave out --link."
            )
        common = {**found, "lag": self.grown.client_state}
        arguments = copy.copy(found.get("args"))
        if arguments is not None:
            arguments.num_layers = self.grown.plan.target_layers
            common["args"] = arguments
        return common

    @cached_property
    def old(self) -> dict[str, Stacked]:
        """Where the source's parameters are stored."""
        tensors = dist_checkpoint.model_tensors(self.contents)
        return parameters_in({name: tensor.shape for name, tensor in tensors.items()})

    @cached_property
    def kinds(self) -> list[tuple[str, State]]:
        """Name prefix and state of each tensor that is stored for a parameter."""
        return [("", "fp32"), *prefixes_of(self.contents)]

    @cached_property
    def new_states(self) -> dict[str, list[tuple[str, State]]]:
        """The tensors with new values, by parameter."""
        found = {
            name: [kind for kind in self.kinds if origin_of(self.grown, name, kind[1]) is None]
            for name in self.state.shapes
        }
        return {name: kinds for name, kinds in found.items() if kinds}

    @property
    def new_bytes(self) -> int:
        """Bytes of new values."""
        return sum(
            numel(self.state.shapes[name]) * self._dtype(name, prefix).itemsize
            for name, kinds in self.new_states.items()
            for prefix, _ in kinds
        )

    def old_places(self) -> Iterator[StorageLocation]:
        """All locations of the source."""
        for _, place, _ in self.contents.places():
            if place is not None:
                yield place

    def link_file(self, name: str, folder: Path, context: WriteContext) -> dict[str, Any]:
        """Hard-link a data file of the source."""
        path = self.grown.source.path
        return dict([hardlink_file(path / name, folder / name, folder, path)])

    def write_new(self, name: str, folder: Path, context: WriteContext) -> dict[str, Any]:
        """Write a parameter's new values."""
        entries: dict[str, Any] = {}
        for prefix, state in self.new_states[name]:
            placeholders, file = PlaceholderTensors(), self._file(name, prefix)
            shape, dtype = self._box(name).shape, self._dtype(name, prefix)
            objects = placeholders(self.state.region(name, state), shape, dtype)
            fill = self.state.fill
            entries[file] = write_objects(folder / file, objects, placeholders, fill, context)
        return entries

    def write_rest(self, folder: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        """Write the metadata and the settings."""
        write_metadata(folder, self._tensors(files), dict(self._objects()))
        written = [dcp_metadata.METADATA]
        if self.is_megatron:
            torch_pickle.save(folder / dist_checkpoint.COMMON, self.common)
            config = dist_checkpoint.read_config(self.grown.source.path)
            (folder / dist_checkpoint.CONFIG).write_text(json.dumps(config), encoding="utf-8")
            written += [dist_checkpoint.COMMON, dist_checkpoint.CONFIG]
        return {name: manifest.file_entry(folder / name) for name in written}

    def _tensors(self, files: Mapping[str, Any]) -> dict[str, StoredTensor]:
        known = {p + where.key for p, _ in self.kinds for where in self.old.values()}
        found = {k: v for k, v in self.contents.tensors.items() if k not in known}
        chunks: dict[str, list[tuple[Box, StorageLocation | None]]] = {}
        for name in self.state.shapes:
            for prefix, state in self.kinds:
                key = prefix + self._where(name).key
                chunks.setdefault(key, []).extend(self._chunks(name, prefix, state, files))
        for name in self.state.shapes:
            where = self._where(name)
            for prefix, _ in self.kinds:
                like = self.contents.tensors[prefix + self.old[self._like(name)].key]
                shape = like.shape
                if where.layer is not None:
                    shape = (self.grown.plan.target_layers, *shape[1:])
                key = prefix + where.key
                found[key] = StoredTensor(like.dtype, shape, tuple(chunks[key]))
        return found

    def _chunks(
        self, name: str, prefix: str, state: State, files: Mapping[str, Any]
    ) -> Iterator[tuple[Box, StorageLocation | None]]:
        """The boxes of one parameter in its stored tensor."""
        origin = origin_of(self.grown, name, state)
        if origin is None:
            file = self._file(name, prefix)
            yield self._box(name), StorageLocation(file, 0, files[file]["size"], transformed=False)
            return
        there, here = self.old[origin], self._where(name)
        for box, place in self.contents.tensors[prefix + there.key].chunks:
            if there.layer is None or here.layer is None:
                yield box, place
            elif box.low[0] == there.layer and box.shape[0] == 1:
                yield Box((here.layer, *box.low[1:]), box.shape), place
            elif box.low[0] <= there.layer < box.low[0] + box.shape[0]:
                raise PlanError(
                    f"{self.grown.source.path}: {prefix + there.key} is stored in pieces of "
                    "several layers, which cannot be linked one by one. Leave out --link."
                )

    def _objects(self) -> Iterator[tuple[str, StorageLocation]]:
        """Names and locations of values that are not tensors; those of layers are duplicated."""
        layers = self.grown.plan.layer_map
        for name, place in self.contents.objects.items():
            head, shard, tail = name.partition("/shard_")
            if place is None:
                continue
            if "layers." not in name or not shard:
                yield name, place
                continue
            index, _ = tail.split("_")
            match = self._layer_name(name)
            old = int(index) if match is None else match.layer
            for new, origin in enumerate(layers):
                if origin.source == old:
                    yield self._object(name, head, new, len(layers)), place

    def _object(self, name: str, head: str, new: int, layers: int) -> str:
        match = self._layer_name(name)
        if match is None or self.grown.stack is None:
            return f"{head}/shard_{new}_{layers}"
        return self.grown.stack.name(new, match.tail)

    def _where(self, name: str) -> Stacked:
        """Where a grown parameter is stored: layers are stacked or numbered as in the source."""
        like = self.old[self._like(name)]
        if like.layer is None:
            stored, own = self._layer_name(like.key), self._layer_name(name)
            if self.grown.stack is None or stored is None or own is None:
                return like
            return Stacked(self.grown.stack.name(own.layer, stored.tail), None)
        return stored_as(name)

    def _like(self, name: str) -> str:
        """An old parameter of the same shape, precision and form of storage: that of layer 0."""
        match = self._layer_name(name)
        if match is None or self.grown.stack is None:
            return name
        return self.grown.stack.name(0, match.tail)

    def _layer_name(self, name: str) -> LayerName | None:
        return self.grown.stack.match(name) if self.grown.stack else None

    def _dtype(self, name: str, prefix: str) -> torch.dtype:
        return self.contents.tensors[prefix + self.old[self._like(name)].key].dtype

    def _box(self, name: str) -> Box:
        shape, layer = self.state.shapes[name], self._where(name).layer
        low = tuple(0 for _ in shape)
        return Box(low, shape) if layer is None else Box((layer, *low), (1, *shape))

    def _file(self, name: str, prefix: str) -> str:
        number = list(self.state.shapes).index(name)
        kind = [known for known, _ in self.kinds].index(prefix)
        return f"__grown_{self.grown.plan.digest[:8]}_{number}_{kind}.distcp"
