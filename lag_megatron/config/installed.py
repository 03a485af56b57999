"""Where this package lies, and the configurations that come with it."""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import lag_megatron
from lag_megatron.errors import ConfigError

PACKAGE = Path(lag_megatron.__file__).resolve().parent


def checkout() -> Path | None:
    """The root of the checkout that the package is imported from; None for an installed wheel."""
    root = PACKAGE.parent
    return root if (root / "launch" / "train.py").is_file() else None


def configs_dir() -> Path:
    """The folder of the configurations: the checkout's ``configs``, or a wheel's copy of it."""
    root = checkout()
    return PACKAGE / "configs" if root is None else root / "configs"


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Where builds are cached: a checkout's ``.cache``, else a folder of the user's cache.

    The latter is ``$XDG_CACHE_HOME/lag_megatron``, by default ``~/.cache/lag_megatron``.
    """
    root = checkout()
    if root is not None:
        return root / ".cache"
    users = environment.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory Specification: a path that is not absolute is ignored.
    base = Path(users) if users.startswith("/") else Path.home() / ".cache"
    return base / "lag_megatron"


def find_config(text: str) -> Path:
    """The file of a configuration: a path, or the name of one that comes with the package.

    Args:
        text: a path that exists; or a name as :func:`list_configs` gives it, such as ``demo`` or
            ``studies/raptr_bert_small``, with or without ``.yaml``.

    Returns:
        the file; for a path that does not exist the path as it is, for its reader to refuse.

    Raises:
        ConfigError: for a name that is neither a file nor known, with the nearest ones.
    """
    path = Path(text)
    if path.exists():
        return path
    name = text.removesuffix(".yaml")
    known = [name for name, _ in list_configs()]
    if name in known:
        return configs_dir() / f"{name}.yaml"
    if path.suffix or path.parent != Path():
        return path
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"{text}: neither a file nor a configuration that comes with this package.{hint} "
        "--list-configs lists them."
    )


def list_configs() -> Iterator[tuple[str, str]]:
    """Names of the configurations that come with the package, each with its summary."""
    folder = configs_dir()
    for file in sorted(folder.glob("*.yaml")) + sorted(folder.glob("studies/*.yaml")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        with file.open(encoding="utf-8") as lines:
            yield name, lines.readline().strip("# \n")  # a comment of one line
