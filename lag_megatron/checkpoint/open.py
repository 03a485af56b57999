"""Checkpoints of any format: detecting, opening, describing and verifying a directory.

Reading a checkpoint runs none of its code.  Files of ``torch.save`` are read ``weights_only``
(``storage/torch_pickle``).  That is not possible for the ``.metadata`` of Distributed Checkpoints,
which an unpickler with a list of allowed names reads (``megatron/dcp_metadata``).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.hf.reader import open_transformers
from lag_megatron.checkpoint.megatron import dcp_metadata, dist_checkpoint, legacy_reader
from lag_megatron.checkpoint.megatron.legacy_reader import open_legacy
from lag_megatron.checkpoint.megatron.reader import open_megatron
from lag_megatron.checkpoint.state.source import CheckpointSource
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.universal import format as universal_format
from lag_megatron.checkpoint.universal.reader import open_universal
from lag_megatron.checkpoint.zero import describe
from lag_megatron.checkpoint.zero.header import resolve_tag
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.config.schema.ranges import MAX_VOCAB_SIZE, require_whole
from lag_megatron.errors import CheckpointError
from lag_megatron.small_files import read_pointer

ZERO, UNIVERSAL, MEGATRON, DCP, HF = "zero", "universal", "megatron", "dcp", "hf"
LEGACY = "megatron_legacy"
_MEGATRON_POINTER = "latest_checkpointed_iteration.txt"
_DESCRIBE: dict[str, Callable[[Path, ParamNames | None], dict[str, Any]]] = {
    UNIVERSAL: universal_format.describe_universal,
    MEGATRON: dist_checkpoint.describe_dist_checkpoint,
    DCP: dist_checkpoint.describe_dist_checkpoint,
    LEGACY: legacy_reader.describe_legacy,
    HF: hf_format.describe_transformers,
}
_FIND_CORRUPTION: dict[str, Callable[[Path], Iterator[str]]] = {
    ZERO: universal_format.find_universal_corruption,  # both are files of torch.save
    UNIVERSAL: universal_format.find_universal_corruption,
    MEGATRON: dist_checkpoint.find_dist_checkpoint_corruption,
    DCP: dist_checkpoint.find_dist_checkpoint_corruption,
    LEGACY: legacy_reader.find_legacy_corruption,
    HF: hf_format.find_transformers_corruption,
}
_READERS: dict[str, Callable[[Path], CheckpointSource]] = {
    ZERO: ZeroCheckpoint.open,
    UNIVERSAL: open_universal,
    LEGACY: open_legacy,
}


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint's directory: ``path`` itself, or the one that a pointer file in it names.

    Raises:
        CheckpointError: if it does not exist.
    """
    if not path.is_dir() or (path / "latest").is_file():
        return resolve_tag(path)
    for pointer, form in ((universal_format.POINTER, "{}"), (_MEGATRON_POINTER, "iter_{:0>7}")):
        if (path / pointer).is_file():
            text = read_pointer(path / pointer, error=CheckpointError)
            tag = path / (text if text == "release" else form.format(text))
            if not tag.is_dir():
                raise CheckpointError(f"{path / pointer}: names {text!r}, but there is no {tag}.")
            return tag
    return path


def detect(path: Path) -> str:
    """The format of the checkpoint in a directory, which may be incomplete or damaged.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    if universal_format.looks_universal(path):
        return UNIVERSAL
    if any(path.glob("*_states.pt")):
        return ZERO
    if (path / dcp_metadata.METADATA).is_file() or any(path.glob("*.distcp")):
        return MEGATRON if dist_checkpoint.is_megatron(path) else DCP
    if dist_checkpoint.is_megatron(path):  # its data files are missing
        return MEGATRON
    if hf_format.looks_like_transformers(path):
        return HF
    if legacy_reader.looks_legacy(path):
        return LEGACY
    if describe.looks_like_checkpoint(path):  # only the manifest is left
        return ZERO
    raise CheckpointError(f"{path}: holds no checkpoint. Give a tag directory.")


def describe_any(path: Path, *, names: ParamNames | None = None) -> dict[str, Any]:
    """Facts about a checkpoint of any format; ``problems`` lists why it is not complete.

    Args:
        path: its own directory.
        names: what the user says of its parameter names.

    Raises:
        PlanError: if the user's names do not fit the model.
        CheckpointError: if it is too damaged to be read, or there is no checkpoint.
    """
    kind = detect(path)
    if kind == ZERO:
        facts = describe.describe_zero(path, names)
        extra = {"marker": manifest.MANIFEST, "notes": []}
        return {**facts, **extra, "problems": [], "complete": True}
    if manifest.is_committed(path):
        manifest.check_sizes(path)
    facts = _DESCRIBE[kind](path, names)
    files = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    notes = [*facts["notes"], *_hardlink_notes(path)]
    return {
        "path": str(path),
        **facts,
        "notes": notes,
        "files": files,
        "bytes": sum(files.values()),
        "complete": not facts["problems"],
    }


def open_checkpoint(
    path: Path, *, vocab_size: int | None = None, weights_only: bool = False
) -> CheckpointSource:
    """Open a checkpoint of any format; tensors stay on disk.

    Args:
        path: its directory, or one with a pointer file to it.
        vocab_size: rows of the vocabulary of a transformers model.
        weights_only: leave out the optimizer states of a distributed checkpoint.

    Raises:
        CheckpointError: if it is damaged or of no known format, or ``vocab_size`` below 1.
    """
    if vocab_size is not None:
        require_whole(
            vocab_size, "--vocab-size", error=CheckpointError, least=1, most=MAX_VOCAB_SIZE
        )
    path = resolve_checkpoint(path)
    kind = detect(path)
    if kind == HF:
        return open_transformers(path, vocab_size=vocab_size)
    if kind in (MEGATRON, DCP):
        return open_megatron(path, weights_only=weights_only)
    return _READERS[kind](path)


def _hardlink_notes(path: Path) -> Iterator[str]:
    """A note on files that are hard links to another checkpoint's."""
    if not manifest.is_committed(path):
        return
    read = manifest.read_manifest(path)
    shared = [entry for entry in read["files"].values() if manifest.SHARED in entry]
    if shared:
        size = sum(entry["size"] for entry in shared)
        yield (
            f"{len(shared)} of {len(read['files'])} files ({size / 2**20:.1f} MiB) are hard "
            f"links, made from {read['source']['path']}"
        )


def find_corruption(path: Path) -> Iterator[str]:
    """Yield all corruption that checksums show: the manifest's, or else those within the files.

    Raises:
        CheckpointError: if the files are too damaged to be read.
    """
    if manifest.is_committed(path):
        yield from manifest.find_corrupted_files(path)
    else:
        yield from _FIND_CORRUPTION[detect(path)](path)
