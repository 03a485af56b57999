"""Hostfiles of DeepSpeed's launcher: a line for each host, like ``host slots=8``."""

import re
from pathlib import Path

from lag_megatron.errors import ConfigError
from lag_megatron.small_files import read_text

_LINE = re.compile(r"(?:[^\s@#]+@)?([^\s@#]+)\s+slots=(\d{1,9})(.*)", re.ASCII)
_COMMENT = re.compile(r"\s+#.*|\s*")
_EXPECTED = "expected `[user@]host slots=N` with N of 1 or more"


def count_slots(path: str | Path) -> int:
    """How many ranks all hosts of a hostfile have room for; comments begin with ``#``.

    Raises:
        ConfigError: if it cannot be read, has a line of another form, or names a host twice.
    """
    text = read_text(
        Path(path), what="a hostfile with lines like `host slots=8`", error=ConfigError
    )
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            host, count = _host(line.strip(), where=f"{path}:{number}")
            if host in slots:
                raise ConfigError(
                    f"{path}:{number}: the host {host!r} is given twice. Remove one of its lines, "
                    "and give the sum as slots."
                )
            slots[host] = count
    if not slots:
        raise ConfigError(f"{path}: names no host: each line has to be `[user@]host slots=N`.")
    return sum(slots.values())


def _host(line: str, *, where: str) -> tuple[str, int]:
    match = _LINE.fullmatch(line)
    if match is None or int(match[2]) < 1:
        raise ConfigError(f"{where}: {_EXPECTED}, got {line!r}. Mend the line, or put # before it.")
    host, count, rest = match.groups()
    if not _COMMENT.fullmatch(rest):
        raise ConfigError(
            f"{where}: {_EXPECTED} and nothing after N but a comment, got {rest.strip()!r}. "
            "DeepSpeed's launcher would pass over it; remove it."
        )
    return host, int(count)
