"""Trying many alterations of a kind, and the smallest of each that breaks it."""

import functools
import random
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.internal.conjecture.engine as _engine
from alterations import Altered, altered
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from kind import Example, Kind, TookTooLong

_engine.MAX_SHRINKING_SECONDS = 5  # hypothesis has no setting of it; 300 s of its own are too many


@dataclass
class Trials:
    """Outcomes of one kind so far; ``breaks`` holds the smallest input of each by its cause."""

    counts: Counter[str] = field(default_factory=Counter)
    breaks: dict[str, tuple[str, str]] = field(default_factory=dict)


class Folders:
    """Sound examples in a session's folder, each built once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @functools.cached_property
    def _built(self) -> dict[object, Path]:
        return {}

    def example(self, kind: Kind) -> Example:
        """The kind's example; kinds of one ``build`` share its files."""
        if kind.build not in self._built:
            folder = self._root / f"{len(self._built)}"
            folder.mkdir()
            kind.build(folder)
            self._built[kind.build] = folder
        return Example(kind, self._built[kind.build])


def cause_of(error: BaseException) -> str:
    """Two breaks with the same one are the same fault: type and place of the exception."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "lag_megatron" in f.filename] or list(frames)
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def try_kind(example: Example, trials: Trials, *, count: int, seed_: int | None) -> None:
    """Try ``count`` alterations; the same ones each time without a seed."""
    last: list[Altered] = []

    def attempt(change: Altered) -> None:
        last[:] = [change]
        try:
            outcome = example.try_altered(change.data, of_bytes=change.of_bytes)
        except TookTooLong as error:
            raise TimeoutError(str(error)) from None
        except Exception as error:
            trials.counts["broken"] += 1
            cause = cause_of(error)
            known = trials.breaks.get(cause)
            if known is None or len(change.about) <= len(known[0]):
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                trials.breaks[cause] = (change.about, said)
            raise
        trials.counts[outcome] += 1

    test = given(altered(example.kind.form, example.sound))(attempt)
    test = settings(
        max_examples=count,
        derandomize=seed_ is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=True,
        print_blob=False,
    )(test)
    if seed_ is not None:
        test = seed(seed_)(test)
    try:
        test()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or not trials.breaks:
            raise
    random.seed()
