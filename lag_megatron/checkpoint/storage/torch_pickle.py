"""Reading and writing DeepSpeed's ``torch.save`` files without DeepSpeed, through ``mmap``.

The files pickle four DeepSpeed classes, and Megatron's settings two enumerations.  They are read as
stand-ins under ``weights_only``, so that a checkpoint cannot run code, and written back under the
same global names.
"""

import enum
import io
import mmap
import os
import pickle
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lag_megatron.checkpoint.storage.torch_zip import is_plain_pickle, tensor_records
from lag_megatron.errors import CheckpointError, write_failure


class _StandIn:
    """Keeps an object's state under the global name of the class it stands for."""


class LossScaler(_StandIn):
    """Stands for DeepSpeed's static loss scaler."""


class DynamicLossScaler(_StandIn):
    """Stands for DeepSpeed's dynamic loss scaler."""


class FragmentAddress(_StandIn):
    """Stands for DeepSpeed's place of a parameter in a flat buffer."""

    def __init__(self, numel: int = 0, start: int = 0) -> None:
        self.numel, self.start = numel, start


class ZeroStage(enum.IntEnum):
    """Stands for DeepSpeed's enumeration of ZeRO stages."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class Enumerated:
    """Stands for a member of one of Megatron's enumerations."""

    def __init__(self, *value: object) -> None:
        self.value = value

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self.value


class ModelType(Enumerated):
    """Stands for Megatron's kind of model."""


class AttentionBackend(Enumerated):
    """Stands for Megatron's choice of attention."""


STAND_INS: dict[type, str] = {
    ModelType: "megatron.core.enums.ModelType",
    AttentionBackend: "megatron.core.transformer.enums.AttnBackend",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    DynamicLossScaler: "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    FragmentAddress: "deepspeed.utils.tensor_fragment.fragment_address",
    ZeroStage: "deepspeed.runtime.zero.config.ZeroStageEnum",
}


def _member(owner: object, name: str) -> ZeroStage:
    """Stands for ``getattr``, with which Python 3.11.0 to 3.11.3 pickle members of enumerations."""
    if owner is not ZeroStage or name not in ZeroStage.__members__:
        raise pickle.UnpicklingError(f"getattr of {owner!r}, {name!r}")
    return ZeroStage[name]


_SAFE: list[Any] = [*STAND_INS.items(), (_member, "builtins.getattr")]

# What torch's readers raise where a flipped bit hits the pickle or the archive around it.
_DAMAGE = (RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError,
           AssertionError)  # fmt: skip

# torch keeps safe_globals, mmap options and skip_data in globals, which all threads share.
_TORCH_SETTINGS = threading.RLock()


def load(path: Path, *, writable: bool = False) -> Any:
    """The objects in a file, tensors mapped from disk rather than read.

    A file that is no archive cannot be mapped: its tensors are read into memory.

    Args:
        path: a file that ``torch.save`` wrote.
        writable: map the file itself, so that writing to a tensor writes to the file.

    Raises:
        CheckpointError: if the file is missing, cut short or not a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: this file of the checkpoint is missing. Restore it, or use another tag."
        )
    flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
    try:
        with (
            _TORCH_SETTINGS,
            torch.serialization.safe_globals(_SAFE),
            torch.serialization.set_default_mmap_options(flags),
        ):
            return torch.load(
                path, map_location="cpu", mmap=not is_plain_pickle(path), weights_only=True
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects that no DeepSpeed checkpoint has ({cause(error)}). "
            "Reading them could run code, so it was left alone. Use another tag."
        ) from None
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: damaged or cut short ({path.stat().st_size} bytes): {cause(error)}. "
            "Restore it from a copy, or use another tag."
        ) from None


def save(path: Path, objects: Any) -> None:
    """Write small objects, with stand-ins under the names of the classes they stand for."""
    torch.save(objects, path, pickle_module=_Pickling)


def create(path: Path, objects: Any) -> Any:
    """Write ``objects`` without the values of their tensors, and map the file for writing.

    The tensors of ``objects`` only give shapes and may be untouched memory.  Space is reserved
    first, because writing to a mapped hole on a full disk kills the process.

    Returns:
        the same objects with tensors that lie in the file.  The caller writes all of them: small
        ones through the tensor, large ones at their ``byte_offsets``.

    Raises:
        CheckpointError: if the disk is full.
    """
    try:
        with _TORCH_SETTINGS, torch.serialization.skip_data():
            torch.save(objects, path, pickle_module=_Pickling)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except (OSError, RuntimeError) as error:  # the latter where torch's writer fails
        path.unlink(missing_ok=True)
        reason, advice = write_failure(error)
        raise CheckpointError(
            f"{path}: cannot write: {reason} Nothing was changed. {advice}"
        ) from None
    return load(path, writable=True)


def byte_offsets(path: Path, tensors: Iterable[Tensor]) -> list[int]:
    """Offsets in a mapped file at which the values of its tensors begin.

    Args:
        path: the file.
        tensors: all tensors of the file.

    Raises:
        CheckpointError: if they do not match the records of the archive.
    """
    listed = list(tensors)
    storages = [t.untyped_storage() for t in listed]
    starts = {s.data_ptr() for s in storages if s.nbytes()}
    records = sorted(record.begin for record in tensor_records(path))
    # The archive keeps one record for each storage, and the mapping keeps their distances.
    base = min(starts) - records[0] if starts and records else 0
    if sorted(start - base for start in starts) != records:
        raise CheckpointError(
            f"{path}: torch wrote {len(records)} tensors in a way that is not understood here, so "
            "no value was written. This version of torch is not supported."
        )
    return [t.data_ptr() - base if s.nbytes() else 0 for t, s in zip(listed, storages, strict=True)]


def cause(error: Exception) -> str:
    """The message of torch's error, without its advice to load with ``weights_only=False``."""
    text = error.strerror if isinstance(error, OSError) else None
    lines = [line.strip() for line in (text or str(error)).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return line.removeprefix("WeightsUnpickler error: ").split(". ")[0].rstrip(".")


_PurePickler: Any = pickle._Pickler  # the C one has no save_global


class _Pickler(_PurePickler):  # type: ignore[misc]
    """Writes stand-ins under the names of the classes they stand for."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and obj in STAND_INS:
            module, _, attribute = STAND_INS[obj].rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch: ClassVar[dict[type, Any]] = {
        **_PurePickler.dispatch,
        type: lambda self, obj: self.save_global(obj),
    }


class _Pickling:
    """The part of the pickle module that ``torch.save`` uses."""

    Pickler = _Pickler
    __name__ = "pickle"

    @staticmethod
    def dumps(obj: Any, protocol: int | None = None) -> bytes:
        """Pickle to bytes."""
        buffer = io.BytesIO()
        _Pickler(buffer, protocol).dump(obj)
        return buffer.getvalue()
