"""JSON of checkpoints: no key may be given twice, and no file name may lead elsewhere."""

import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is not JSON, or gives a key twice: Python would take the last value.
    """
    return json.loads(text, object_pairs_hook=_unique)


def leads_out(name: str) -> bool:
    """Whether a name that a checkpoint gives to one of its files is not within its directory."""
    path = PurePosixPath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found
