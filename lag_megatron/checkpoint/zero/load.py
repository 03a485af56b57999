"""Opening DeepSpeed's files, and refusing those that do not belong together."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.state.layout import Container, Segment, Topology
from lag_megatron.checkpoint.state.optimizer_states import Optimizer, states_of
from lag_megatron.checkpoint.storage import torch_pickle
from lag_megatron.checkpoint.storage.torch_zip import DAMAGE, is_plain_pickle
from lag_megatron.checkpoint.zero.file_names import torch_optimizer_state
from lag_megatron.errors import CheckpointError

FOREIGN = "not written by DeepSpeed, or by a version that is not understood here."
_TITLES: dict[Optimizer, str] = {"adamw": "Adam's moments", "adafactor": "Adafactor's means"}


def load_states(file: Path) -> Any:
    """The objects of a model or optimizer file, tensors mapped from disk.

    Their pickle is compared with its checksum before: torch does not, and a flipped bit there makes
    other objects.

    Raises:
        CheckpointError: if the file is missing, damaged or none of DeepSpeed's.
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
    """Whether a shard's masters are padded as its moments are: DeepSpeed's BF16_Optimizer's.

    It is ZeRO-1's for bf16 with fp32 gradients; each of the two loads the other's files.
    """
    optimizer = (states or {}).get("optimizer_state_dict") or {}
    return "single_partition_of_fp32_groups" in optimizer and "zero_stage" not in optimizer


def optimizer_of(topology: Topology, model: Any) -> Optimizer:
    """Whose states a ZeRO-0 model file holds; AdamW's where it holds none that are known."""
    try:
        entries = torch_optimizer_state(topology, model, None)["state"].values()
        kept = {key for entry in entries for key in entry}
    except (LookupError, TypeError, AttributeError):
        return "adamw"  # what is missing is told when the buffers are looked at
    return "adafactor" if kept & {*states_of("adafactor")} else "adamw"


def require_known_states(file: Path, inner: Any, optimizer: Optimizer) -> None:
    """Refuse an optimizer state that is more than expected, or not of one step in a group.

    Args:
        file: where it was read.
        inner: the torch optimizer's ``state_dict``.
        optimizer: whose it should be.

    Raises:
        CheckpointError: naming what is not understood.
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
    """Refuse a model file that lists other parameters, or in another order, than the first one.

    Raises:
        CheckpointError: if it does.
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
    """Refuse an optimizer file that says itself that its buffers hold something else.

    ZeRO 1 and 2 write down which part of which parameter lies where.  DeepSpeed's loader does not
    look at that, so it takes shards that were swapped.  ZeRO-3's files say nothing of the kind.

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
                    f"{_slice_text(found.get(name))}, but the order of parameters in the model file "
                    f"gives {_slice_text(expected.get(name))}. Files are swapped or of different "
                    "checkpoints. Restore the right one, or use another tag."
                )


def _slice_text(place: tuple[int, int] | None) -> str:
    return "no element" if place is None else f"{place[0]} elements from {place[1]} on"
