"""The layer that a parameter belongs to, from its name."""

import re
from collections.abc import Iterable

LAYER = re.compile(r"^(?P<head>.*\blayers\.)(?P<layer>\d+)(?P<tail>\..+)$")


def layers_in(names: Iterable[str]) -> list[int]:
    """The numbers of the layers among these parameters, in increasing order."""
    return sorted({int(match["layer"]) for name in names if (match := LAYER.match(name))})
