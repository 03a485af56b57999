"""Reading small files of text, JSON and YAML: each mistake is one error that names the file.

Whoever reads one says what it should be (``what``, as in "expected WHAT, but ..."), which error is
raised, and what to do about it (``advice``).  A file that is not UTF-8, too long or empty is
refused, and so is a key that is given twice, of which Python's and YAML's readers drop the first.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lag_megatron.errors import LagError, printable

MAX_BYTES = 1 << 30  # the largest are tokenizers and lists of a large checkpoint's files
_MAX_POINTER_CHARACTERS = 1000
_MAX_NODES = 1_000_000  # values in a YAML file
_BLOCK = 1 << 18  # Python sets aside as much memory as a read may return
_KINDS = {
    dict: ("a JSON object", "a mapping"),
    list: ("a list", "a list"),
    str: ("a string", "a string"),
    bool: ("true or false", "true or false"),
    int: ("a number", "a number"),
    float: ("a number", "a number"),
    type(None): ("null", "nothing"),
}
# What PyYAML raises beside its own errors, for values like `!!int x` or `2001-99-99`.
_YAML_ERRORS = (
    *(yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError),
    *(RecursionError, OverflowError),
)


def read_text(
    path: Path, *, what: str, error: type[LagError], advice: str = "", max_bytes: int = MAX_BYTES
) -> str:
    """The text of a file, without a byte order mark; a name that ends in ``.gz`` is unpacked.

    Args:
        path: of the file.
        what: what it should be, with its article.
        error: the kind of error to raise.
        advice: one or more sentences on what to do.
        max_bytes: a longer file is refused.

    Raises:
        LagError: of the kind ``error``, if it cannot be read, is too long, empty or not UTF-8.
    """
    found = ""
    data = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while len(data) <= max_bytes and (block := file.read(_BLOCK)):
                data += block
    except FileNotFoundError:
        found = "there is no such file"
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        found = f"it cannot be unpacked: {problem}"
    except OSError as problem:
        found = f"it cannot be read: {problem.strerror or problem}"
    except ValueError as problem:  # a path with a NUL character
        found = f"its path cannot be used: {problem}"
    if not found and len(data) > max_bytes:
        found = f"it is longer than {max_bytes:,} bytes"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        byte = data[problem.start]
        found = f"it is not UTF-8 (byte {problem.start + 1:,} is 0x{byte:02x})"
        text = ""
    if not found and not text.strip():
        found = "it is empty"
    if found:
        raise _refusal(error, path, what, found, advice)
    return text


def read_json(
    path: Path, *, what: str, error: type[LagError], advice: str = "", shape: type | None = dict
) -> Any:
    """The value of a JSON file.

    Args:
        path: of the file.
        what: what it should be, with its article.
        error: the kind of error to raise.
        advice: one or more sentences on what to do.
        shape: the type that the value must have; None for any.

    Raises:
        LagError: of the kind ``error``, if it cannot be read or is not such a value.
    """
    text = read_text(path, what=what, error=error, advice=advice)
    return parse_json(text, where=path, what=what, error=error, advice=advice, shape=shape)


def parse_json(
    text: str | bytes,
    *,
    where: object,
    what: str,
    error: type[LagError],
    advice: str = "",
    shape: type | None = dict,
) -> Any:
    """The value of JSON that was read already.

    Args:
        text: the JSON.
        where: what the message begins with, or a function that finds it out.
        what: what it should be, with its article.
        error: the kind of error to raise.
        advice: one or more sentences on what to do.
        shape: the type that the value must have; None for any.

    Raises:
        LagError: of the kind ``error``, if it is not JSON or not a value of the type ``shape``.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        found = f"it cannot be read as JSON: {_reason(problem)}"
        raise _refusal(error, where, what, found, advice) from None
    if shape is not None and not isinstance(value, shape):
        found = f"it holds {_kind(value, 0)} in place of {_KINDS[shape][0]}"
        raise _refusal(error, where, what, found, advice)
    return value


def read_json_lines(
    path: Path,
    *,
    what: str,
    error: type[LagError],
    advice: str = "",
    check: Callable[[dict[str, Any], str], object] = lambda line, where: None,
) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; none where there is no such file.

    A last line that a kill has cut short, and blank lines, are passed over.

    Args:
        path: of the file.
        what: what it should be, with its article.
        error: the kind of error to raise.
        advice: one or more sentences on what to do.
        check: is called with each object and with file and number of its line, and may raise.

    Raises:
        LagError: of the kind ``error``, with its number, for any other line that is no object.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as problem:
        found = f"it cannot be read: {problem.strerror or problem}"
        raise _refusal(error, path, what, found, advice) from None
    lines = data.split(b"\n")  # not splitlines, which knows further ends of lines
    objects = []
    for number, value in _objects(lines, path, what, error, advice):
        check(value, f"{path}:{number}")
        objects.append(value)
    return objects


def _objects(
    lines: list[bytes], path: Path, what: str, error: type[LagError], advice: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            where = f"{path}:{number}"
            yield (
                number,
                parse_json(line, where=where, what=f"a line of {what}", error=error, advice=advice),
            )
        except LagError:
            if number < len(lines):
                raise


def read_yaml(path: Path, *, what: str, error: type[LagError], advice: str = "") -> Any:
    """The value of a YAML file.

    Raises:
        LagError: of the kind ``error``, if it cannot be read or is not YAML.
    """
    text = read_text(path, what=what, error=error, advice=advice)
    return parse_yaml(text, where=path, what=what, error=error, advice=advice)


def parse_yaml(
    text: str, *, where: object, what: str, error: type[LagError], advice: str = ""
) -> Any:
    """The value of YAML that was read already; ``where`` is what the message begins with.

    Raises:
        LagError: of the kind ``error``, if it is not YAML.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
        _require_tree(value, frozenset(), iter(range(_MAX_NODES)))
        return value
    except _YAML_ERRORS as problem:
        found = f"it cannot be read as YAML: {_reason(problem)}"
        raise _refusal(error, where, what, found, advice) from None


def _require_tree(value: Any, above: frozenset[int], left: Iterator[int]) -> None:
    """Refuse aliases that hold themselves, or that make a small file a large value."""
    if id(value) in above:
        raise ValueError("an alias stands within what it is an alias of")
    if next(left, None) is None:
        raise ValueError(f"with its aliases it has more than {_MAX_NODES:,} values")
    if isinstance(value, dict | list):
        above |= {id(value)}
        for inner in value.values() if isinstance(value, dict) else value:
            _require_tree(inner, above, left)


def read_pointer(path: Path, *, error: type[LagError]) -> str:
    """The name of a directory beside a file like ``latest`` that names it.

    Raises:
        LagError: of the kind ``error``, if it holds anything but one path within its folder.
    """
    what = "the name of a checkpoint's directory beside it"
    advice = "Write the name into it, or give the directory itself."
    name = read_text(path, what=what, error=error, advice=advice).strip()
    place = PurePosixPath(name)
    if len(name) > _MAX_POINTER_CHARACTERS:
        found = f"it holds {len(name):,} characters"
    elif printable(name) != name or "\n" in name or "\t" in name:
        found = f"it holds characters that no such name has ({name!r})"
    elif place.is_absolute() or ".." in place.parts or not place.parts:
        found = f"it leads elsewhere ({name!r})"
    else:
        return name
    raise _refusal(error, path, what, found, advice)


def _refusal(error: type[LagError], where: object, what: str, found: str, advice: str) -> LagError:
    place = where() if callable(where) else where
    return error(f"{place}: expected {what}, but {found}. {advice}".rstrip())


def _reason(problem: BaseException) -> str:
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(problem).split()).rstrip(".") or type(problem).__name__


def _kind(value: object, language: int) -> str:
    return _KINDS.get(type(value), (type(value).__name__,) * 2)[language]


def describe_kind(value: object) -> str:
    """What a value of YAML is, in words: "a list", "a number" and so on."""
    return _kind(value, 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return members


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            problem = f"the key {twice!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)
