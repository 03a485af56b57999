"""What a user says of a model's parameter names: their roles, and which list holds the layers.

The names file is YAML::

    roles:
      "*.ln_?.weight": norm_weight      # patterns of whole names, as in fnmatch
      "*.c_proj.weight": branch_output
    layers: "transformer.h.{}"          # {} is the layer's number
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lag_megatron.errors import ConfigError
from lag_megatron.small_files import read_yaml

Role = Literal[
    "norm_weight",
    "norm_weight_zero_centred",
    "bias",
    "embedding",
    "head",
    "branch_input",
    "branch_output",
    "layer_scale",
    "fixed",
]
ROLES: tuple[Role, ...] = typing.get_args(Role)
_KEYS = ("roles", "layers")
_EXAMPLE = '{roles: {"*.ln_?.weight": norm_weight}, layers: "transformer.h.{}"}'


@dataclass(frozen=True, slots=True)
class ParamNames:
    """Roles of parameters and the place of the layers, where no table has them.

    Attributes:
        roles: by pattern of whole parameter names (``fnmatch``, case-sensitive).
        layers: the name of a layer's module with ``{}`` for its number.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    layers: str | None = None


def read_param_names(path: Path) -> ParamNames:
    """Read a names file.

    Raises:
        ConfigError: if it cannot be read, or says what is not understood.
    """
    return parse_param_names(read_names_tree(path), where=str(path))


def read_names_tree(path: Path) -> Any:
    """The values of a names file, unchecked.

    Raises:
        ConfigError: if it cannot be read as YAML.
    """
    return read_yaml(path, what=f"names of parameters like {_EXAMPLE}", error=ConfigError)


def parse_param_names(values: Any, *, where: str) -> ParamNames:
    """Check plain values.

    Args:
        values: a mapping with ``roles``, ``layers`` or both.
        where: what messages begin with.

    Raises:
        ConfigError: for the first mistake.
    """
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{where}: expected a mapping like {_EXAMPLE} (got {values!r}).")
    if unknown := [key for key in values if key not in _KEYS]:
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}. Its keys are {' and '.join(_KEYS)}."
        )
    roles, layers = values.get("roles"), values.get("layers")
    roles = {} if roles is None else roles
    if not isinstance(roles, Mapping):
        raise ConfigError(
            f"{where}: roles must be a mapping of name patterns to roles (got {roles!r})."
        )
    for pattern, role in roles.items():
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: the pattern {pattern!r} is not text. Put it in quotes.")
        if role not in ROLES:
            raise ConfigError(
                f"{where}: {pattern!r} has the unknown role {role!r}. "
                f"The roles are {', '.join(ROLES)}."
            )
    if layers is not None and not _is_layer_pattern(layers):
        raise ConfigError(
            f"{where}: layers must be the name of a layer's module with one {{}} for its number "
            f'at the end, like "transformer.h.{{}}" (got {layers!r}).'
        )
    return ParamNames(dict(roles), layers)


def _is_layer_pattern(layers: Any) -> bool:
    return isinstance(layers, str) and layers.count("{}") == 1 and layers.endswith(".{}")
