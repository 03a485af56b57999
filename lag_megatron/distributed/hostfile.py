"""Hostfiles of DeepSpeed's launcher: a line for each host, like ``host slots=8``."""

from pathlib import Path

from lag_megatron.errors import ConfigError


def count_slots(path: str | Path) -> int:
    """How many ranks all hosts of a hostfile have room for; comments begin with ``#``.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        lines = [line.split("#")[0].split() for line in Path(path).read_text().splitlines()]
        slots = [field for words in lines for field in words[1:] if field.startswith("slots=")]
        return sum(int(field.removeprefix("slots=")) for field in slots)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a hostfile with lines like `host slots=8`: {error}"
        ) from None
