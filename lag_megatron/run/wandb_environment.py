"""What W&B's environment variables say; an argument, here the configuration, comes before them.

A variable that is set to nothing counts as not set.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lag_megatron.config import WandbConfig
from lag_megatron.errors import ConfigError

_MODES = ("online", "offline", "shared", "disabled")
_OLD_MODES = {"run": "online", "dryrun": "offline"}  # which W&B still takes
_TRUE, _FALSE = ("1", "on", "yes", "true"), ("0", "off", "no", "false")
_PROJECT = "lag-megatron"


@dataclass(frozen=True, slots=True)
class WandbPlaces:
    """Where the W&B runs of one training run go.

    Attributes:
        mode: online, offline, shared or disabled.
        project: name of the project.
        group: of all W&B runs.
        name: what the names of all W&B runs begin with.
        folder: in which W&B makes its folder ``wandb``.
    """

    mode: str
    project: str
    group: str
    name: str
    folder: Path

    @property
    def files(self) -> Path:
        """The folder that W&B writes."""
        hidden = self.folder / ".wandb"
        return hidden if hidden.exists() else self.folder / "wandb"


def wandb_places(config: WandbConfig, run: Path, environment: Mapping[str, str]) -> WandbPlaces:
    """Where the W&B runs of the training run in the folder ``run`` go.

    Raises:
        ConfigError: for a value of WANDB_MODE or WANDB_DISABLED that W&B does not know.
    """
    return WandbPlaces(
        mode=_mode(config, environment),
        project=config.project or environment.get("WANDB_PROJECT") or _PROJECT,
        group=environment.get("WANDB_RUN_GROUP") or run.name,
        name=environment.get("WANDB_NAME") or run.name,
        folder=Path(environment.get("WANDB_DIR") or run).expanduser().absolute(),
    )


def unset_empty_variables() -> None:
    """Remove W&B's variables that are set to nothing, of which W&B refuses some."""
    for name in [n for n, value in os.environ.items() if n.startswith("WANDB_") and not value]:
        del os.environ[name]


def _mode(config: WandbConfig, environment: Mapping[str, str]) -> str:
    if config.mode == "disabled":
        return "disabled"
    said = environment.get("WANDB_MODE", "")
    mode = _OLD_MODES.get(said, said)
    if mode not in ("", *_MODES):  # W&B refuses it even where an argument says otherwise
        raise _unknown("WANDB_MODE", said, (*_MODES, *_OLD_MODES))
    if config.mode != "auto":
        return config.mode
    if _is_disabled(environment.get("WANDB_DISABLED", "")):
        return "disabled"
    return mode or ("online" if _has_key(environment) else "offline")


def _is_disabled(said: str) -> bool:
    if said.lower() not in ("", *_TRUE, *_FALSE):
        raise _unknown("WANDB_DISABLED", said, (*_TRUE, *_FALSE))
    return said.lower() in _TRUE


def _unknown(name: str, said: str, known: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"the environment variable {name} is {said!r}, expected one of {', '.join(known)}. "
        "Correct it or unset it."
    )


def _has_key(environment: Mapping[str, str]) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    server = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    netrc = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return bool(server) and server in netrc.read_text(errors="replace")
    except OSError:
        return False
