"""The small files that lie beside a tag, as transformers' Trainer writes them.

``Trainer.train(resume_from_checkpoint=FOLDER)`` reads them beside the tag: its own progress from
``trainer_state.json``, and where there are any its schedule and random states.  What has a known
meaning after growth, or on another number of ranks, goes beside the new tag.  Everything else is
named.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.atomic_io import write_atomically
from lag_megatron.checkpoint.hf.format import CONFIG, TRAINER
from lag_megatron.checkpoint.hf.grown_config import UnknownDepthError, grown_config
from lag_megatron.checkpoint.hf.tokenizer import tokenizer_files
from lag_megatron.checkpoint.open import UNIVERSAL, ZERO, detect
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.grown_state import GrownState
from lag_megatron.small_files import read_json

_UNCHANGED = (TRAINER, "generation_config.json", "scheduler.pt")  # of any depth and any ranks
_RANDOM_STATES = "rng_state*.pth"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
# The folder's own records: pointers, locks, and the script that DeepSpeed adds.
_NOT_STATE = ("latest", "latest_*", "*.lock", "*.part", "zero_to_fp32.py")


@dataclass(frozen=True, slots=True)
class TrainerFiles:
    """The files beside a tag.

    Attributes:
        carried: content of those that go beside the new tag, by name.
        left_out: names of those that do not, each with the reason where there is one to give.
    """

    carried: Mapping[str, bytes]
    left_out: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the carried files into the folder that holds the new tag; again does no harm."""
        for name, content in self.carried.items():
            if not _holds(folder / name, content):
                write_atomically(folder / name, content)

    def describe(self) -> list[str]:
        """What is carried over and what is not, a line each; none without such files."""
        lines = [("carried over", sorted(self.carried)), ("not carried over", self.left_out)]
        return [f"{what}: {', '.join(names)}" for what, names in lines if names]


def trainer_files(growth: GrownState, target: Path, *, ranks: int | None = None) -> TrainerFiles:
    """The files beside the source's tag, for the tag directory ``target``.

    Args:
        growth: what becomes of the source.
        target: the tag directory that is written.
        ranks: of the training that will load it; by default those of the growth's topology.

    Raises:
        PlanError: if the target's folder has such a file with other content.
        CheckpointError: if ``config.json`` cannot be read.
    """
    folder = growth.source.path.resolve().parent
    beside_itself = target.absolute().parent.resolve() == folder
    is_tag = detect(growth.source.path) in (ZERO, UNIVERSAL)
    if beside_itself or not is_tag or not any((folder / n).is_file() for n in (TRAINER, CONFIG)):
        return TrainerFiles({}, ())
    if ranks is None:
        ranks = growth.topology.data_size * growth.topology.tensor_size
    left_out: dict[str, str] = {}
    carried = {path.name: _content(path) for path in _known(folder, ranks)}
    if (folder / CONFIG).is_file():
        try:
            carried[CONFIG] = _config(growth, folder / CONFIG)
        except UnknownDepthError as error:
            left_out[CONFIG] = str(error)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    for name in names:
        if name not in carried and not _matches(name, _NOT_STATE):
            left_out.setdefault(name, _reason(name))
    for name, content in carried.items():
        place = target.parent / name
        if place.exists() and not _holds(place, content):
            raise PlanError(
                f"{place}: exists already with other content than the one that belongs to "
                f"{target.name}. Name another target folder, or remove it."
            )
    texts = (f"{name} ({why})" if why else name for name, why in left_out.items())
    return TrainerFiles(carried, tuple(texts))


def _known(folder: Path, ranks: int) -> list[Path]:
    """The files, beside the configuration, that stay as they are."""
    found = [folder / name for name in _UNCHANGED] + tokenizer_files(folder)
    random_states = list(folder.glob(_RANDOM_STATES))  # a file for each rank
    if len(random_states) == ranks:
        found += random_states
    return [path for path in found if path.is_file()]


def _config(growth: GrownState, path: Path) -> bytes:
    plan = growth.plan
    if plan.operator == "identity":
        return _content(path)
    config = read_json(
        path,
        what="settings of a transformers model",
        error=CheckpointError,
        advice="Restore it from a copy.",
    )
    origins = [origin.source for origin in plan.layer_map]
    grown = grown_config(config, source_layers=plan.source_layers, origins=origins)
    return (json.dumps(grown, indent=2, sort_keys=True) + "\n").encode()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: it goes beside the new tag, but cannot be read: {error.strerror}. Make it "
            "readable, or move it away."
        ) from None


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _reason(name: str) -> str:
    if _matches(name, (_RANDOM_STATES,)):
        return "of another number of ranks"
    return "weights: lag-convert --to hf writes them" if _matches(name, _WEIGHTS) else ""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)
