"""Loading DeepSpeed's files, and checks that they are sound and belong together."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.state.layout import Container, Layout, Segment, Topology
from lag_megatron.checkpoint.state.optimizer_states import Optimizer, states_of
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.storage.torch_zip import DAMAGE, is_plain_pickle
from lag_megatron.checkpoint.zero.file_names import (
    files_of,
    state_buffer,
    torch_optimizer_state,
)
from lag_megatron.errors import CheckpointError

FOREIGN = "not written by DeepSpeed, or by a version that is not understood here."
_TITLES: dict[Optimizer, str] = {"adamw": "Adam's moments", "adafactor": "Adafactor's means"}


def load_states(file: Path) -> Any:
    """The objects of a model or optimizer file, with tensors mapped from disk.

    The pickle is compared with its CRC32 first: torch does not do so, and a flipped bit in it
    changes the objects.

    Raises:
        CheckpointError: if the file is missing, damaged or not DeepSpeed's.
    """
    if file.is_file() and not is_plain_pickle(file):
        _require_sound_pickle(file)
    states = torch_pickle.load(file)
    if not isinstance(states, dict) or "ds_version" not in states:
        raise CheckpointError(f"{file}: {FOREIGN}")
    return states


def _require_sound_pickle(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl") and record.CRC:  # 0: none was written
                    archive.read(record)
    except DAMAGE as e:
        raise CheckpointError(
            f"{file}: damaged or cut short ({file.stat().st_size} bytes): {e}. "
            "Restore it from a copy, or use another tag."
        ) from None


def pads_masters(states: Any) -> bool:
    """Whether a shard's masters are padded like its moments: those of ``BF16_Optimizer`` are.

    DeepSpeed uses that class for ZeRO-1 in bf16 with fp32 gradients.
    """
    optimizer = (states or {}).get("optimizer_state_dict") or {}
    return "single_partition_of_fp32_groups" in optimizer and "zero_stage" not in optimizer


def optimizer_of(topology: Topology, model: Any) -> Optimizer:
    """The optimizer whose states a ZeRO-0 model file holds; ``adamw`` if it has no known ones."""
    try:
        entries = torch_optimizer_state(topology, model, None)["state"].values()
        kept = {key for entry in entries for key in entry}
    except (LookupError, TypeError, AttributeError):
        return "adamw"  # the check of the buffers reports what is missing
    return "adafactor" if kept & {*states_of("adafactor")} else "adamw"


def require_known_states(file: Path, inner: Any, optimizer: Optimizer) -> None:
    """Check that an optimizer keeps known states only, and one step count in each group.

    Args:
        file: where the state was read, for messages.
        inner: the torch optimizer's ``state_dict``.
        optimizer: the expected optimizer.

    Raises:
        CheckpointError: naming what is not supported.
    """
    for entry in inner["state"].values():
        if unknown := sorted(set(entry) - {"step", *states_of(optimizer)[1:]}):
            raise CheckpointError(
                f"{file}: the optimizer keeps {', '.join(unknown)} beside {_TITLES[optimizer]}, "
                "and it is not understood here how that would grow."
            )
    for number, group in enumerate(inner["param_groups"]):
        steps = {int(inner["state"][member].get("step", 0)) for member in group["params"]}
        if len(steps) > 1:
            raise CheckpointError(
                f"{file}: the parameters of group {number} have taken {sorted(steps)} steps, but "
                "ZeRO keeps one count for a group. Train all of them for the same steps."
            )


def require_same_list(file: Path, states: Any, first: Any) -> None:
    """Check that a model file lists the same parameters in the same order as the first one.

    Raises:
        CheckpointError: if it does not.
    """
    if states.get("param_shapes") != first.get("param_shapes"):
        raise CheckpointError(
            f"{file}: its param_shapes list other parameters, or in another order, than the first "
            "model file's: files of different checkpoints are mixed, or one is damaged. "
            "Restore the right one, or use another tag."
        )


def require_same_slices(
    file: Path, states: Any, held: Mapping[Container, Sequence[tuple[str, Segment]]]
) -> None:
    """Compare the layout with an optimizer file's own ``param_slice_mappings``.

    ZeRO 1 and 2 write them; DeepSpeed's loader ignores them, so it would load swapped shards.
    ZeRO-3's files have none.

    Raises:
        CheckpointError: naming the first parameter that lies elsewhere.
    """
    listed = states["optimizer_state_dict"].get("param_slice_mappings") or ()
    for places, parts in zip(listed, held.values(), strict=False):
        found = {name: (place.numel, place.start) for name, place in places.items()}
        expected = {name: (part.length, part.offset) for name, part in parts if part.length}
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                raise CheckpointError(
                    f"{file}: it is not this rank's shard: for {name} it names "
                    f"{_slice_text(found.get(name))}, but the order of parameters in the model "
                    f"file gives {_slice_text(expected.get(name))}. Files are swapped or of "
                    "different checkpoints. Restore the right one, or use another tag."
                )


def _slice_text(place: tuple[int, int] | None) -> str:
    return "no element" if place is None else f"{place[0]} elements from {place[1]} on"


def require_buffer_lengths(
    file: Path, layout: Layout, topology: Topology, model: Any, states: Any, data_rank: int
) -> None:
    """Check that a rank's buffers have the lengths of its layout.

    Args:
        file: where they were read, for messages.
        layout: derived from the shapes of the parameters.
        topology: of the checkpoint.
        model: the objects of the rank's model file (ZeRO-0), or None.
        states: the objects of its optimizer file (ZeRO 1 to 3), or None.
        data_rank: of the rank.

    Raises:
        CheckpointError: naming the first buffer that is missing or of another length.
    """
    names = list(layout.shapes)
    for state, there in layout.states.items():
        is_unpadded = state == "fp32" and not pads_masters(states)
        lengths = there.filled if is_unpadded else there.lengths
        for key in there.keys(data_rank):
            try:
                buffer = state_buffer(topology, model, states, key, state, names)
                found = f"has {buffer.numel()} elements"
            except (LookupError, TypeError, AttributeError):
                found = "is missing"
            expected = lengths[Container(data_rank, key)]
            if found != f"has {expected} elements":
                raise CheckpointError(
                    f"{file}: {state} of buffer {key} {found}, but its parameters "
                    f"take {expected}. Only Adam's and Adafactor's states in DeepSpeed's "
                    "usual layout are understood here, so nothing was read from it."
                )


def require_own_files(path: Path, topology: Topology) -> None:
    """Check that a directory holds no shards of other ranks or stages.

    Raises:
        CheckpointError: if it does: they are left from another save, or mixed in.
    """
    others = sorted(
        {p.name for p in path.glob("*_states.pt")} - set(files_of(topology)),
        key=lambda name: (len(name), name),
    )
    if others:
        raise CheckpointError(
            f"{path}: holds {len(others)} files ({', '.join(others[:3])}) that do not belong "
            f"to a ZeRO-{topology.zero_stage} checkpoint of {topology.data_size} data-parallel x "
            f"{topology.tensor_size} tensor-parallel ranks: saves of different worlds are mixed. "
            "Move them away if they are older, or use another tag."
        )
