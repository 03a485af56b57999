"""The model to evaluate as a transformers directory, exported from a checkpoint if needed."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.checkpoint.hf import format as hf_format
from lag_megatron.checkpoint.hf.tokenizer import (
    TokenizerFile,
    save_transformers_tokenizer,
    tokenizer_files,
)
from lag_megatron.checkpoint.hf.writer import Precision
from lag_megatron.checkpoint.open import ZERO, detect, resolve_checkpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.errors import CheckpointError, ConfigError, DataError
from lag_megatron.evaluation.harness import model_window
from lag_megatron.growth.apply.conversion import Conversion
from lag_megatron.run.directory import RunDirectory, read_facts

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """How a checkpoint becomes a directory of transformers.

    Attributes:
        tokenizer: a ``tokenizer.json``; by default the run's own.
        dtype: of the weights.
        folder: where the directory is kept; by default it is temporary.
        lock: refuse a second writer of ``folder``.
    """

    tokenizer: Path | None = None
    dtype: Precision = "fp32"
    folder: Path | None = None
    lock: bool = True


def find_checkpoint(path: Path) -> Path:
    """The checkpoint's or the model's own directory; of a run, its newest checkpoint.

    Raises:
        CheckpointError: if there is none, or it is of a kind that cannot be exported.
    """
    if _is_run(path):
        tags = [
            tag for stage in sorted(path.glob("stage*")) for tag in manifest.committed_tags(stage)
        ]
        if not tags:
            raise CheckpointError(f"{path}: a run that has no checkpoint yet.")
        return tags[-1]
    path = resolve_checkpoint(path)
    if hf_format.looks_like_transformers(path):
        return path
    if (kind := detect(path)) != ZERO:
        raise CheckpointError(
            f"{path}: a checkpoint of the kind {kind!r}. Give a run directory, a ZeRO checkpoint "
            "or a directory of transformers."
        )
    return path


@contextlib.contextmanager
def export_to_transformers(path: Path, options: ExportOptions) -> Iterator[Path]:
    """A transformers directory with the model of ``path``, which is from :func:`find_checkpoint`.

    Raises:
        ConfigError: if the model is not a decoder, or has what the options name already.
        DataError: if no tokenizer is known.
    """
    if hf_format.looks_like_transformers(path):
        with _with_tokenizer(path, options) as model:
            yield model
        return
    with contextlib.ExitStack() as held:
        folder = options.folder
        if folder is None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory())) / path.name
        checkpoint = ZeroCheckpoint.open(path)
        if (checkpoint.client_state.get("model") or {}).get("family") == "bert":
            raise ConfigError(
                f"{path}: a BERT, which predicts tokens that are masked; the tasks ask a decoder "
                "for those that follow. Evaluate it by its validation loss."
            )
        conversion = Conversion(
            source=checkpoint,
            to="hf",
            tokenizer=find_tokenizer(path, options.tokenizer),
            dtype=options.dtype,
        )
        write(conversion.job(folder), lock=options.lock and options.folder is not None)
        yield folder


@contextlib.contextmanager
def _with_tokenizer(path: Path, options: ExportOptions) -> Iterator[Path]:
    """A directory of transformers; beside the files of one without tokenizer stands the given."""
    has_one = bool(tokenizer_files(path))
    if options.folder or (options.tokenizer and has_one):
        owned = ", with a tokenizer of its own" if has_one else ""
        leave = "--tokenizer and --export-dir" if has_one else "--export-dir"
        raise ConfigError(
            f"{path}: is a directory of transformers already{owned}. Leave out {leave}."
        )
    if has_one:
        yield path
        return
    if options.tokenizer is None:
        raise DataError(
            f"{path}: has no tokenizer. Name it with --tokenizer FILE, a tokenizer.json of Hugging "
            "Face."
        )
    file = find_tokenizer(path, options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for entry in path.iterdir():
            (Path(folder) / entry.name).symlink_to(entry.resolve())
        window = model_window(path)
        save_transformers_tokenizer(file, Path(folder), is_decoder=True, window=window)
        yield Path(folder)


def find_tokenizer(path: Path, given: Path | None) -> TokenizerFile:
    """The tokenizer that a checkpoint was trained with: the one given, or its run's.

    Raises:
        DataError: if neither can be found or read.
    """
    from lag_megatron.data.datasets.tokenizer import load_tokenizer  # brings Megatron: seconds

    file = given or _tokenizer_of_run(path)
    return TokenizerFile(file, end_id=load_tokenizer(file).eod)


def _tokenizer_of_run(path: Path) -> Path:
    root = next((parent for parent in path.resolve().parents if _is_run(parent)), None)
    if root is None:
        raise DataError(
            f"{path}: not in a run directory, so its tokenizer is not known. Name it with "
            "--tokenizer FILE, a tokenizer.json of Hugging Face."
        )
    facts = read_facts(root)
    folder = RunDirectory(root).data_cache / str(facts.get("data_digest"))
    # A run that was moved with its cache, then one whose text was prepared elsewhere.
    for place in (folder, Path(str(facts.get("data_folder", folder)))):
        if (place / _TOKENIZER).is_file():
            return place / _TOKENIZER
    raise DataError(
        f"{folder}: the prepared text of the run {root} is not there, and so neither is its "
        "tokenizer. Restore it, or name the tokenizer with --tokenizer FILE."
    )


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "run.json").is_file()
