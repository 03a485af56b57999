"""Preparing the data of a configuration: tokenize once, reuse the result afterwards."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lag_megatron.config import DataConfig
from lag_megatron.data.datasets.blended_dataset import (
    MIXTURE,
    Prepared,
    PreparedMixture,
    has_places,
    require_mixture,
    write_mixture,
    write_places,
)
from lag_megatron.data.datasets.prepared_dataset import (
    META,
    TOKENIZER,
    PreparedData,
    PreparedSource,
)
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.prepare import staging_dir
from lag_megatron.data.prepare.build import build_folder, validation_mask
from lag_megatron.data.prepare.corpus import Corpus, open_corpus
from lag_megatron.data.prepare.fingerprint import (
    data_fingerprint,
    save_tokenizer,
    tokenizer_file,
    train_on,
)
from lag_megatron.data.prepare.sources import CHUNK_BYTES
from lag_megatron.data.prepare.worker_pool import WorkerPool
from lag_megatron.errors import DataError
from lag_megatron.targets.overlap import require_apart


def prepare_data(
    config: DataConfig,
    *,
    cache_dir: Path,
    output: Path | None = None,
    workers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> Prepared:
    """Tokenize the sources into ``cache_dir/<digest>``, or open what is already there.

    One process calls this; the others open the folder with :func:`open_prepared`.  The digest
    covers the texts and all settings that the files depend on.  A folder appears there only when it
    is complete; interrupted work is kept beside it, and the next call resumes it.

    A mixture has a folder for each source and one that names them and holds their tokenizer, which
    is trained on all by weight, unless a source is ``prepared``: then its tokenizer serves all.

    Args:
        config: sources, tokenizer, objective.
        cache_dir: for all folders.
        output: the folder in place of ``cache_dir/<digest>``; those of a mixture's sources are
            made inside it.
        workers: processes that read and encode; one is this process, with a thread a core.
        chunk_bytes: of the files, done at a time by a worker; the result does not depend on it.

    Raises:
        DataError: if the text, the tokenizer or the disk does not allow it, or ``output`` touches
            the text.
    """
    if output is not None:
        _require_outside(output, config)
    with WorkerPool(workers) as pool:
        job = _Job(config, cache_dir, output, pool, chunk_bytes)
        try:
            return _prepare_mixture(job) if config.mixture else _prepare_source(job)
        except OSError as error:
            raise _not_writable(output or cache_dir, error) from error


def _require_outside(output: Path, config: DataConfig) -> None:
    """Refuse an output that is one of the inputs, or within one.

    Raises:
        DataError: naming both.
    """
    named = [*config.paths, *(path for source in config.mixture for path in source.paths)]
    for path in (Path(name).expanduser() for name in named):
        if path.exists():
            require_apart(output, path, error=DataError)


def open_prepared(folder: Path) -> Prepared:
    """Open a folder that :func:`prepare_data` made, of one source or of a mixture.

    Raises:
        DataError: if this host does not see it, or it is incomplete or damaged.
    """
    mixture = (folder / MIXTURE).is_file()
    return PreparedMixture.open(folder) if mixture else PreparedData.open(folder)


@dataclass(frozen=True, slots=True)
class _Job:
    config: DataConfig
    cache_dir: Path
    output: Path | None
    pool: WorkerPool
    chunk_bytes: int


def _prepare_source(job: _Job) -> Prepared:
    config = job.config
    if config.source == "prepared":
        prepared = _already_prepared(config.paths, job, "data")
        _common_tokenizer(config, {"data.paths": prepared.sources[0].data}, "data")
        return prepared
    corpus = open_corpus(config, workers=job.pool, chunk_bytes=job.chunk_bytes)
    validation = validation_mask(corpus, config)
    ready = tokenizer_file(config)
    digest = data_fingerprint(config, content=corpus.content_hash, tokenizer=ready)
    return build_folder(
        job.output or job.cache_dir / digest,
        digest=digest,
        corpus=corpus,
        validation=validation,
        sentences=_as_sentences(config),
        make_tokenizer=lambda: ready or train_on(config, [corpus], [validation], [1.0]),
        workers=job.pool,
    )


def _prepare_mixture(job: _Job) -> PreparedMixture:
    config = job.config
    ready, corpora, masks = _open_sources(job)
    tokenizer = _common_tokenizer(config, ready, "data.mixture")
    contents = {name: data.digest for name, data in ready.items()}
    contents |= {name: corpus.content_hash for name, corpus in corpora.items()}
    listed = [(source.name, source.weight, contents[source.name]) for source in config.mixture]
    digest = data_fingerprint(config, content=listed, tokenizer=tokenizer)
    folder = job.output or job.cache_dir / digest
    places = {name: data.folder for name, data in ready.items()}
    if _is_complete(folder, digest, places):
        return PreparedMixture.open(folder)
    with staging_dir.exclusive(folder, digest=digest, complete=folder / MIXTURE):
        if (
            folder / MIXTURE
        ).is_file():  # by the process that held the lock, or with other source paths
            if not _is_complete(folder, digest, places):
                write_places(folder, places)
            return PreparedMixture.open(folder)
        if not (folder / TOKENIZER).is_file():
            weights = [source.weight for source in config.mixture if source.name in corpora]
            made = tokenizer or train_on(
                config, list(corpora.values()), list(masks.values()), weights
            )
            save_tokenizer(made, folder / TOKENIZER)
        ready |= _build_sources(job, corpora, masks, folder)
        sources = [
            PreparedSource(name=source.name, weight=source.weight, data=ready[source.name])
            for source in config.mixture
        ]
        write_mixture(folder, digest=digest, sources=sources)
        staging_dir.finish(folder)
    return PreparedMixture.open(folder)


def _open_sources(
    job: _Job,
) -> tuple[dict[str, PreparedData], dict[str, Corpus], dict[str, np.ndarray]]:
    """By name: the sources that are prepared, the others, and what of those is validated on."""
    ready, corpora, masks = {}, {}, {}
    for source in job.config.mixture:
        where = f"data.mixture.{source.name}"
        if source.source == "prepared":
            ready[source.name] = _one_folder(_already_prepared(source.paths, job, where), where)
            continue
        corpus = open_corpus(source, workers=job.pool, chunk_bytes=job.chunk_bytes)
        corpora[source.name] = corpus
        masks[source.name] = validation_mask(corpus, job.config, where=where)
    return ready, corpora, masks


def _build_sources(
    job: _Job, corpora: dict[str, Corpus], masks: dict[str, np.ndarray], folder: Path
) -> dict[str, PreparedData]:
    """Each source by itself with the mixture's tokenizer, so that other mixtures can share it."""
    tokenizer = load_tokenizer(folder / TOKENIZER)
    built = {}
    for name, corpus in corpora.items():
        digest = data_fingerprint(job.config, content=corpus.content_hash, tokenizer=tokenizer)
        built[name] = build_folder(
            folder / name if job.output else job.cache_dir / digest,
            digest=digest,
            corpus=corpus,
            validation=masks[name],
            sentences=_as_sentences(job.config),
            make_tokenizer=lambda: tokenizer,
            workers=job.pool,
        )
    return built


def _is_complete(folder: Path, digest: str, places: Mapping[str, Path]) -> bool:
    """Whether the mixture is complete and names the current folders of its prepared sources.

    Raises:
        DataError: if it is another mixture.
    """
    if not (folder / MIXTURE).is_file():
        return False
    require_mixture(folder, digest=digest)
    return has_places(folder, places)


def _already_prepared(paths: Sequence[str], job: _Job, where: str) -> Prepared:
    """The folder that a source ``prepared`` names.

    Raises:
        DataError: if it is not there or was made for another kind of objective.
    """
    folder = Path(paths[0]).expanduser()
    if not any((folder / name).is_file() for name in (META, MIXTURE)):
        raise DataError(
            f"{where}.paths: {folder} has no {META} or {MIXTURE}. Expected a folder that "
            "tools/prepare_data.py has completed."
        )
    prepared = open_prepared(folder)
    for source in prepared.sources:
        if source.data.sentences != _as_sentences(job.config):
            made = "sentences, as mlm needs them" if source.data.sentences else "whole documents"
            raise DataError(
                f"{where}.paths: {source.data.folder} was prepared as {made}, which does not suit "
                f"data.objective {job.config.objective!r}. Prepare the text for that objective."
            )
    return prepared


def _one_folder(prepared: Prepared, where: str) -> PreparedData:
    if isinstance(prepared, PreparedMixture):
        raise DataError(
            f"{where}.paths: {prepared.folder} is a mixture itself. Name the folders of its "
            "sources, each with its weight."
        )
    return prepared


def _common_tokenizer(
    config: DataConfig, ready: Mapping[str, PreparedData], where: str
) -> Tokenizer | None:
    """The tokenizer that is given, by a file or by sources that are prepared; None is none.

    Raises:
        DataError: if they differ.
    """
    given = tokenizer_file(config)
    digests = {data.tokenizer_digest for data in ready.values()}
    if given is not None:
        digests.add(given.digest)
    if len(digests) > 1:
        found = {name: data.tokenizer() for name, data in ready.items()}
        if given is not None:
            found["data.tokenizer.path"] = given
        listed = "; ".join(f"{name}: {_described(each)}" for name, each in found.items())
        raise DataError(
            f"{where}: the tokenizers differ ({listed}). Prepare all texts by "
            "tools/prepare_data.py with the same --tokenizer FOLDER/tokenizer.json and the same "
            "--sentinels, and give data.tokenizer that file and number, or leave it out."
        )
    return given or next((data.tokenizer() for data in ready.values()), None)


def _described(tokenizer: Tokenizer) -> str:
    return (
        f"{tokenizer.vocab_size} tokens with {len(tokenizer.sentinels)} sentinels, digest "
        f"{tokenizer.digest[:12]}"
    )


def _as_sentences(config: DataConfig) -> bool:
    return config.objective == "mlm"


def _not_writable(folder: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{folder}: no room left for the prepared data: {error.strerror}. Free some disk; the "
            "same command goes on from here. Or put the data on another disk."
        )
    return DataError(
        f"{folder}: cannot write the prepared data: {error}. "
        "Expected a folder that this user may write to."
    )
