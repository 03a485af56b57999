"""The manifest of a checkpoint, and commits that are atomic: a checkpoint is complete or absent.

A tag is written as ``<tag>.tmp``; each file is flushed to disk and hashed; then come the manifest,
the rename to ``<tag>`` and the pointer ``latest``.  A kill at any point leaves the old state or the
new one.  Only ``latest`` may then still name the older tag; a run that resumes corrects it.
"""

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from lag_megatron.atomic_io import flush_to_disk, write_atomically
from lag_megatron.checkpoint.storage.file_names import leads_out
from lag_megatron.errors import CheckpointError, sizes
from lag_megatron.small_files import read_json

MANIFEST, LATEST = "manifest.json", "latest"
SHARED = "shared_with"  # entry of a hard link: the name of the source's file
# Entries of a file that holds several states: the byte runs and checksum of each, and of the rest.
STATES_APART, NO_STATE = "states", "rest"
MANIFEST_FORMAT = 1
_CHUNK = 1 << 20
_REMOVED = ".removed-"


def temporary(path: Path) -> Path:
    """The staging directory of a tag, which ``commit`` renames."""
    return path.with_name(path.name + ".tmp")


def file_entry(path: Path) -> dict[str, Any]:
    """Flush a finished file to disk and return its manifest entry: size and xxh3-128 checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "xxh3_128": file_checksum(path)}


def file_checksum(path: Path, runs: Iterable[Sequence[int]] | None = None) -> str:
    """The xxh3-128 checksum, in hex, of a file or of runs (begin, end) of its bytes."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        for begin, end in [(0, path.stat().st_size)] if runs is None else runs:
            file.seek(begin)
            left = end - begin
            while left and (count := file.readinto(buffer[:left])):
                digest.update(buffer[:count])
                left -= count
    return digest.hexdigest()


def commit(
    path: Path,
    *,
    files: Mapping[str, Any],
    metadata: Mapping[str, Any],
    pointer: str | None = LATEST,
) -> None:
    """Commit the finished ``<tag>.tmp`` as ``path`` and point its folder's ``latest`` to it.

    Args:
        path: the tag directory.
        files: manifest entry of every file.
        metadata: further entries: step, growth plan, source, versions.
        pointer: name of the file beside it that will name it; None for none.
    """
    staging = temporary(path)
    manifest = {"format": MANIFEST_FORMAT, **metadata, "files": dict(sorted(files.items()))}
    write_atomically(staging / MANIFEST, json.dumps(manifest, indent=1))
    flush_to_disk(staging)
    os.rename(staging, path)
    if pointer is None:
        flush_to_disk(path.parent)
    else:
        point_latest(path, pointer)


def point_latest(path: Path, pointer: str = LATEST, pointer_text: str | None = None) -> None:
    """Write the tag's name into ``latest`` beside it, from which DeepSpeed loads.

    Args:
        path: the tag directory.
        pointer: the file to write; Megatron reads another one than DeepSpeed.
        pointer_text: what to write instead of the tag's name.
    """
    write_atomically(path.parent / pointer, path.name if pointer_text is None else pointer_text)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted one never counts as committed."""
    for left in path.parent.glob(f"{_REMOVED}*"):  # left by an earlier process
        shutil.rmtree(left, ignore_errors=True)
    if not path.is_dir():
        return
    aside = path.with_name(f"{_REMOVED}{path.name}-{secrets.token_hex(4)}")
    try:
        (path / MANIFEST).unlink(missing_ok=True)
        os.rename(path, aside)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be deleted: {error.strerror}. Delete it by hand and run the same "
            "command again."
        ) from None
    # On NFS files that a process still maps stay there as .nfs…; then so does the folder, for now.
    shutil.rmtree(aside, ignore_errors=True)


def committed_tags(folder: Path) -> list[Path]:
    """The committed tags of a folder, oldest first; tags sort by their step."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix != ".tmp" and is_committed(p))


def is_committed(path: Path) -> bool:
    """Whether a tag directory has a manifest."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a tag directory.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    file = path / MANIFEST
    if not file.exists():
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so it was not finished here or was written by another program."
        )
    manifest: dict[str, Any] = read_json(
        file, what="a checkpoint's manifest", error=CheckpointError, advice="Use another tag."
    )
    if manifest.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest.get('format')!r} is not {MANIFEST_FORMAT}; "
            "written by another version of this program."
        )
    files = manifest.get("files")
    if outside := [name for name in files if leads_out(name)] if isinstance(files, dict) else []:
        raise CheckpointError(
            f"{file}: damaged: lists {outside[0]!r}, which is not in this directory. "
            "Use another tag."
        )
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(
            f"{file}: damaged: no list of files with a size and checksum of each. Use another tag."
        )
    return manifest


def _is_entry(entry: Any) -> bool:
    """Whether a manifest's entry has a size and a checksum."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("xxh3_128"), str)
    )


def check_sizes(path: Path) -> dict[str, Any]:
    """Check that each file of the manifest exists with the size it was written with.

    Returns:
        the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or has another size.
    """
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing. Restore it, or use another tag.")
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"{file}: {size} bytes, but {entry['size']} were written. "
                "Restore it, or use another tag."
            )
    return manifest


def find_corrupted_files(
    path: Path, names: Collection[str] | None = None, *, states: Collection[str] | None = None
) -> Iterator[str]:
    """Compare files with the manifest, and yield each that differs with the reason.

    Args:
        path: a committed directory.
        names: the files to compare; all by default.
        states: the states to compare in files with a checksum for each state, where zip records and
            pickles are always compared; all by default.
    """
    manifest = read_manifest(path)
    yield from (f"{n}: not in the manifest" for n in names or () if n not in manifest["files"])
    for name, entry in manifest["files"].items():
        file = path / name
        if names is not None and name not in names:
            continue
        if not file.is_file():
            yield f"{name}: missing"
        elif file.stat().st_size != entry["size"]:
            yield f"{name}: {file.stat().st_size} bytes, expected {entry['size']}"
        elif states is None or not _cover_the_file(entry):
            if file_checksum(file) != entry["xxh3_128"]:
                yield f"{name}: content differs from its checksum"
        else:
            for state, there in entry[STATES_APART].items():
                wanted = state == NO_STATE or state in states
                if wanted and file_checksum(file, there["runs"]) != there["xxh3_128"]:
                    yield f"{name}: {state}: content differs from its checksum"


def _cover_the_file(entry: Mapping[str, Any]) -> bool:
    """Whether the byte runs of an entry's states cover the whole file."""
    try:
        runs = sorted(run for there in entry[STATES_APART].values() for run in there["runs"])
        ends = [0, *(end for _, end in runs)]
        return [begin for begin, _ in runs] == ends[:-1] and ends[-1] == entry["size"]
    except (LookupError, TypeError, AttributeError, ValueError):
        return False  # then the checksum of the whole file is compared


def digest_of(path: Path) -> str:
    """One checksum for the content of a tag directory, without reading the files.

    It is taken of the manifest's checksums, or without a manifest, of sizes and modification times.
    """
    if is_committed(path):
        known: Any = read_manifest(path)["files"]
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        stats = {str(file.relative_to(path)): file.stat() for file in files}
        known = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return xxhash.xxh3_128(json.dumps(known, sort_keys=True).encode()).hexdigest()


def require_space(folder: Path, *, needed: int, what: str) -> None:
    """Check that a file system has ``needed`` free bytes.

    Raises:
        CheckpointError: if it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        wanted, there = sizes(needed, free)
        raise CheckpointError(
            f"{folder}: {what} needs {wanted}, but only {there} are free. Free some space or use "
            "another directory; nothing was written."
        )
