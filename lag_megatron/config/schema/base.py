"""What all sections of the configuration share."""

from typing import Any

# Of every dataclass: unknown keys are errors.
FORBID = {"extra": "forbid"}

# A configuration as YAML gives it, before it is checked.
Tree = dict[str, Any]
