"""Growth of distributed checkpoints by their metadata, which says where values lie.

The data files are linked as they are, a duplicate is one more entry for the same bytes, and only
values that are new are written.
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
from lag_megatron.checkpoint.writer.file_writer import WriteContext
from lag_megatron.checkpoint.writer.job import Part, WriteJob
from lag_megatron.checkpoint.zero.writer import write_objects
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.conversion import unsharded_state
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.growth.apply.hardlink_universal import hardlink_file, origin_of


def hardlink_dcp(growth: GrownState, target: Path) -> WriteJob:
    """The order for a grown distributed checkpoint of one: its data linked, its metadata new.

    Args:
        growth: of a distributed checkpoint, under the topology of one rank without ZeRO.
        target: the directory to come, an ``iter_0000000`` for Megatron.

    Raises:
        PlanError: if stored pieces reach over layers, or settings cannot be brought up to date.
    """
    grown = _GrownMetadata(growth, unsharded_state(growth))
    return WriteJob(
        target=target,
        parts=[
            *(
                Part(f"link {file}", partial(grown.link_file, file))
                for file in sorted({place.file for place in grown.old_places()})
            ),
            *(Part(name, partial(grown.write_fresh, name)) for name in grown.fresh),
        ],
        about={**growth.about, "written_as": "linked"},
        needed=grown.fresh_bytes,
        what="what is not linked",
        check=growth.source.require_sound,
        finish=grown.write_rest,
        pointer=TRACKER if grown.is_megatron else None,
        says=_tracked(target),
    )


def _tracked(target: Path) -> str:
    """What Megatron's pointer says of a directory: its iteration, or ``release``."""
    number = target.name.removeprefix("iter_")
    return str(int(number)) if number.isdigit() else target.name


@dataclass(frozen=True)
class _GrownMetadata:
    """Where everything of a grown distributed checkpoint lies."""

    growth: GrownState
    state: UnshardedState

    @cached_property
    def contents(self) -> dcp_metadata.Contents:
        """Of the source."""
        return dcp_metadata.read_metadata(self.growth.source.path)

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron-Core wrote the source, or torch."""
        return dist_checkpoint.is_megatron(self.growth.source.path)

    @cached_property
    def common(self) -> dict[str, Any]:
        """Megatron's settings, brought up to date.

        Raises:
            PlanError: if they hold what is not known here.
        """
        found, note = dist_checkpoint.read_common(self.growth.source.path)
        if note:
            raise PlanError(
                f"{self.growth.source.path}: {note}, so its number of layers cannot be changed. "
                "Leave out --link."
            )
        common = {**found, "lag": self.growth.client_state}
        arguments = copy.copy(found.get("args"))
        if arguments is not None:
            arguments.num_layers = self.growth.plan.target_layers
            common["args"] = arguments
        return common

    @cached_property
    def old(self) -> dict[str, Stacked]:
        """Where the source's parameters are stored."""
        tensors = dist_checkpoint.model_tensors(self.contents)
        return parameters_in({name: tensor.shape for name, tensor in tensors.items()})

    @cached_property
    def kinds(self) -> list[tuple[str, State]]:
        """Prefix and values of everything that is stored of a parameter."""
        return [("", "fp32"), *prefixes_of(self.contents)]

    @cached_property
    def fresh(self) -> dict[str, list[tuple[str, State]]]:
        """By parameter, what of it has to be written."""
        found = {
            name: [kind for kind in self.kinds if origin_of(self.growth, name, kind[1]) is None]
            for name in self.state.shapes
        }
        return {name: kinds for name, kinds in found.items() if kinds}

    @property
    def fresh_bytes(self) -> int:
        """Bytes of values that have to be written."""
        return sum(
            numel(self.state.shapes[name]) * self._dtype(name, prefix).itemsize
            for name, kinds in self.fresh.items()
            for prefix, _ in kinds
        )

    def old_places(self) -> Iterator[StorageLocation]:
        """Every place of the source."""
        for _, place, _ in self.contents.places():
            if place is not None:
                yield place

    def link_file(self, name: str, folder: Path, crew: WriteContext) -> dict[str, Any]:
        """Link a data file of the source."""
        path = self.growth.source.path
        return dict([hardlink_file(path / name, folder / name, folder, path)])

    def write_fresh(self, name: str, folder: Path, crew: WriteContext) -> dict[str, Any]:
        """Write a parameter's new values."""
        entries: dict[str, Any] = {}
        for prefix, state in self.fresh[name]:
            room, file = PlaceholderTensors(), self._file(name, prefix)
            shape, dtype = self._box(name).shape, self._dtype(name, prefix)
            objects = room(self.state.region(name, state), shape, dtype)
            fill = self.state.fill
            entries[file] = write_objects(folder / file, objects, room, fill, crew)
        return entries

    def write_rest(self, folder: Path, files: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata and the settings."""
        write_metadata(folder, self._tensors(files), dict(self._objects()))
        written = [dcp_metadata.METADATA]
        if self.is_megatron:
            torch_pickle.save(folder / dist_checkpoint.COMMON, self.common)
            config = (self.growth.source.path / dist_checkpoint.CONFIG).read_text(encoding="utf-8")
            (folder / dist_checkpoint.CONFIG).write_text(
                json.dumps(json.loads(config)), encoding="utf-8"
            )
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
                    shape = (self.growth.plan.target_layers, *shape[1:])
                key = prefix + where.key
                found[key] = StoredTensor(like.dtype, shape, tuple(chunks[key]))
        return found

    def _chunks(
        self, name: str, prefix: str, state: State, files: Mapping[str, Any]
    ) -> Iterator[tuple[Box, StorageLocation | None]]:
        """The boxes of one parameter in its stored tensor."""
        origin = origin_of(self.growth, name, state)
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
                    f"{self.growth.source.path}: {prefix + there.key} is stored in pieces of "
                    "several layers, which cannot be linked one by one. Leave out --link."
                )

    def _objects(self) -> Iterator[tuple[str, StorageLocation]]:
        """Places of what is no tensor; that of layers goes where its layer goes."""
        layers = self.growth.plan.layer_map
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
        if match is None or self.growth.stack is None:
            return f"{head}/shard_{new}_{layers}"
        return self.growth.stack.name(new, match.tail)

    def _where(self, name: str) -> Stacked:
        """Where a grown parameter is stored, in the source's way."""
        like = self.old[self._like(name)]
        if like.layer is None:
            stored, own = self._layer_name(like.key), self._layer_name(name)
            if self.growth.stack is None or stored is None or own is None:
                return like
            return Stacked(self.growth.stack.name(own.layer, stored.tail), None)
        return stored_as(name)

    def _like(self, name: str) -> str:
        """An old parameter of the same kind: of the same shape, precision and way of storing."""
        match = self._layer_name(name)
        if match is None or self.growth.stack is None:
            return name
        return self.growth.stack.name(0, match.tail)

    def _layer_name(self, name: str) -> LayerName | None:
        return self.growth.stack.match(name) if self.growth.stack else None

    def _dtype(self, name: str, prefix: str) -> torch.dtype:
        return self.contents.tensors[prefix + self.old[self._like(name)].key].dtype

    def _box(self, name: str) -> Box:
        shape, layer = self.state.shapes[name], self._where(name).layer
        low = tuple(0 for _ in shape)
        return Box(low, shape) if layer is None else Box((layer, *low), (1, *shape))

    def _file(self, name: str, prefix: str) -> str:
        number = list(self.state.shapes).index(name)
        kind = [known for known, _ in self.kinds].index(prefix)
        return f"__grown_{self.growth.plan.digest[:8]}_{number}_{kind}.distcp"
