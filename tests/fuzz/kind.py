"""A kind of file that the product reads, and what became of one altered example of it."""

import contextlib
import io
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lag_megatron.errors import LagError, printable

Form = Literal["bytes", "json", "jsonl", "yaml", "text", "torch"]
Outcome = Literal["refused", "same", "free"]
_SECONDS = 20
_BYTES = 4 << 30  # beside what the process has; sound examples take a few megabytes


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one kind of file is built, altered and read.

    Attributes:
        name: as it stands in the table.
        modules: modules of ``lag_megatron`` whose reading this covers.
        build: writes a sound example into an empty folder; kinds with the same ``build`` share it.
        file: the file that is altered, relative to that folder; a glob pattern takes the first.
        form: which alterations make sense beside those of bytes.
        read: reads the folder as a user would have it read; its value is compared by ``repr``.
        values_are_free: why altered values may give another result; empty if a schema or a
            checksum forbids that.
        bytes_are_free: the same for altered bytes.
        names: other texts that name the file well enough, e.g. the place where it was given.
    """

    name: str
    modules: tuple[str, ...]
    build: Callable[[Path], object]
    file: str
    form: Form
    read: Callable[[Path], Any]
    values_are_free: str = ""
    bytes_are_free: str = ""
    names: tuple[str, ...] = ()


class Broken(AssertionError):
    """An altered file was taken for another sound one, or refused without its name."""


class NotNamed(Broken):
    """The error does not name the file."""


class Changed(Broken):
    """Exit 0 and another result, where a schema or a checksum could tell."""


class TookTooLong(BaseException):
    """Not an ``Exception``, so that no reader takes it for damage."""


class Example:
    """A sound example of a kind on disk, whose file is altered for a moment."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.path = next(iter(sorted(folder.glob(kind.file))))
        self.sound = self.path.read_bytes()
        self._expected = _read(kind, folder)

    def try_altered(self, data: bytes, *, of_bytes: bool) -> Outcome:
        """What becomes of the altered file.

        Raises:
            Broken: if the error does not name it or the result differs.
            Exception: whatever else the reader raises.
        """
        kind = self.kind
        self._replace(data)
        try:
            found = _read(kind, self.folder)
        except LagError as error:
            names = (self.path.name, *kind.names)
            if not any(printable(name) in str(error) for name in names):
                raise NotNamed(f"{type(error).__name__}: {error}") from None
            return "refused"
        finally:
            self._replace(self.sound)
        if found == self._expected:
            return "same"
        if not (kind.bytes_are_free if of_bytes else kind.values_are_free):
            raise Changed(_first_difference(self._expected, found))
        return "free"

    def _replace(self, data: bytes) -> None:
        """Write a new file: the old one may still be mapped."""
        draft = self.path.with_name(self.path.name + ".fuzz")
        draft.write_bytes(data)
        os.replace(draft, self.path)


def _read(kind: Kind, folder: Path) -> str:
    out = io.StringIO()
    with _limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return repr(kind.read(folder))


@contextlib.contextmanager
def _limited():
    """Raise where more memory or time is taken than a damaged file may cost."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(*_: object) -> None:
    raise TookTooLong(f"longer than {_SECONDS} s")


def _first_difference(expected: str, found: str) -> str:
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((number for number, (a, b) in pairs if a != b), min(len(expected), len(found)))
    part = slice(max(at - 40, 0), at + 80)
    return f"...{expected[part]!r} became ...{found[part]!r}"
