"""What parameters' names say: which layer they belong to."""

import re
from collections.abc import Iterable

LAYER = re.compile(r"^(?P<head>.*\blayers\.)(?P<layer>\d+)(?P<tail>\..+)$")


def layers_in(names: Iterable[str]) -> list[int]:
    """The numbers of the layers that parameters of these names belong to, rising."""
    return sorted({int(match["layer"]) for name in names if (match := LAYER.match(name))})
