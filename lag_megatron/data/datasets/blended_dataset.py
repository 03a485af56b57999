"""Several prepared sources with one tokenizer, drawn from by weight."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import write_atomically
from lag_megatron.data.datasets.checksums import checksum, require_checksum
from lag_megatron.data.datasets.prepared_dataset import (
    TOKENIZER,
    PreparedData,
    PreparedSource,
    read_meta,
)
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.datasets.unigram import mixed_cross_entropy
from lag_megatron.errors import DataError
from lag_megatron.planning.blend import Blend

MIXTURE = "mixture.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedMixture:
    """A folder that names the folders of its sources and holds their tokenizer.

    Attributes:
        folder: where mixture.json and tokenizer.json are.
        digest: 32 hex digits over the sources, their weights and all that shapes their files.
        sources: in the configuration's order.
        unigram_entropy: as :class:`PreparedData`'s, of validation and training tokens by weight.
    """

    folder: Path
    digest: str
    sources: tuple[PreparedSource, ...]
    unigram_entropy: float

    @staticmethod
    def open(folder: Path) -> "PreparedMixture":
        """Read what :func:`lag_megatron.data.prepare_data` wrote, on any rank.

        Raises:
            DataError: if this host does not see a folder, or one is incomplete or damaged.
        """
        listed = _listed(folder)
        tokenizer = folder / TOKENIZER
        require_checksum(tokenizer, got=checksum(tokenizer), expected=listed.tokenizer)
        sources = tuple(
            PreparedSource(
                name=name,
                weight=weight,
                data=PreparedData.open(_found(listed.places[name], folder)),
            )
            for name, weight in listed.weights.items()
        )
        return PreparedMixture(
            folder=folder,
            digest=listed.digest,
            sources=sources,
            unigram_entropy=listed.unigram_entropy,
        )

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer, not padded."""
        return self.sources[0].data.vocab_size

    @property
    def train_tokens(self) -> int:
        """Tokens to train on, all sources together."""
        return sum(source.data.train_tokens for source in self.sources)

    @property
    def validation_tokens(self) -> int:
        """Tokens to validate on, all sources together."""
        return sum(source.data.validation_tokens for source in self.sources)

    @property
    def tokenizer_path(self) -> Path:
        """Path of the ``tokenizer.json``."""
        return self.folder / TOKENIZER

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer."""
        return load_tokenizer(self.tokenizer_path)

    def verify(self) -> None:
        """Read all files of all sources and compare their checksums.

        Raises:
            DataError: naming the file that was changed.
        """
        for source in self.sources:
            source.data.verify()

    def facts(self) -> dict[str, Any]:
        """What a report says of the texts, as JSON."""
        each = [source.data.facts() for source in self.sources]
        names = ("bytes", "train_tokens", "validation_tokens", "train_documents",
                 "validation_documents", "skipped_files")  # fmt: skip
        shares = Blend([source.weight for source in self.sources]).shares
        return {
            "source": "mixture",
            **{name: sum(facts[name] for facts in each) for name in names},
            "sources": [
                {"name": source.name, "weight": source.weight, "share": share, **facts}
                for source, share, facts in zip(self.sources, shares, each, strict=True)
            ],
        }


Prepared = PreparedData | PreparedMixture


def write_mixture(folder: Path, *, digest: str, sources: Sequence[PreparedSource]) -> None:
    """Write mixture.json, which makes the folder complete; tokenizer.json is there already."""
    weights = [source.weight for source in sources]
    values = {
        "digest": digest,
        "unigram_entropy": mixed_cross_entropy([s.data.unigrams() for s in sources], weights),
        "tokenizer": checksum(folder / TOKENIZER),
        "sources": [
            {"name": s.name, "weight": s.weight, "folder": _place(s.data.folder, folder)}
            for s in sources
        ],
    }
    write_atomically(folder / MIXTURE, json.dumps(values, indent=2) + "\n")


def require_mixture(folder: Path, *, digest: str) -> None:
    """Refuse a complete folder of another mixture.

    Raises:
        DataError: with both digests.
    """
    found = _listed(folder).digest
    if found != digest:
        raise DataError(
            f"{folder}: holds another mixture: a source, a weight, the tokenizer or a setting "
            f"differs ({found} there, {digest} wanted). Give another folder, or delete this one."
        )


def has_places(folder: Path, sources: Mapping[str, Path]) -> bool:
    """Whether a complete mixture names these folders of its sources, by name of the source."""
    places = _listed(folder).places
    return all(places.get(name) == _place(place, folder) for name, place in sources.items())


def write_places(folder: Path, sources: Mapping[str, Path]) -> None:
    """Name in a complete mixture the folders where the same sources are now, by name."""
    values = read_meta(folder, MIXTURE)
    for source in values["sources"]:
        if source["name"] in sources:
            source["folder"] = _place(sources[source["name"]], folder)
    write_atomically(folder / MIXTURE, json.dumps(values, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listed:
    """What mixture.json says; weights and places by name of the source, places as written."""

    digest: str
    unigram_entropy: float
    tokenizer: str
    weights: dict[str, float]
    places: dict[str, str]


def _listed(folder: Path) -> _Listed:
    values = read_meta(folder, MIXTURE)
    try:
        return _Listed(
            digest=str(values["digest"]),
            unigram_entropy=float(values["unigram_entropy"]),
            tokenizer=str(values["tokenizer"]),
            weights={str(s["name"]): float(s["weight"]) for s in values["sources"]},
            places={str(s["name"]): str(s["folder"]) for s in values["sources"]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / MIXTURE}: cannot be read as a mixture: {error!r}. "
            "Delete the folder and prepare it again."
        ) from None


def _found(place: str, mixture: Path) -> Path:
    """Where a source is; a relative place is one from the mixture's folder, not from a link."""
    return Path(os.path.normpath(mixture.resolve() / place))


def _place(source: Path, mixture: Path) -> str:
    """Path of a source from its mixture: relative to a neighbour, so that both can be moved."""
    source, mixture = source.resolve(), mixture.resolve()
    near = source.is_relative_to(mixture.parent)
    return os.path.relpath(source, mixture) if near else str(source)
