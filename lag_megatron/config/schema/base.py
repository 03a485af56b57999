"""What all sections of the configuration share."""

from typing import Any

# Of every dataclass: unknown keys, and numbers that are not finite, are errors.
FORBID = {"extra": "forbid", "allow_inf_nan": False}

# A configuration as YAML gives it, before it is checked.
Tree = dict[str, Any]
