#!/usr/bin/env python3
"""The tables of configuration keys in docs/configuration.md, from the schema and its docstrings.

python tools/docs/configuration.py [--write]

Prints the tables, or writes them between the page's markers.
"""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lag_megatron.config.schema.run import GrowthConfig, RunConfig
from lag_megatron.config.stage_policy import StackingConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: tools/docs/configuration.py -->", "<!-- end of keys -->"
_RANGE = re.compile(r"; (above -?\d+|\d+ or more|in [\[(]-?\d+, -?\d+[\])])\.$")
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a configuration: dotted path, type, default, meaning and allowed range as text."""

    path: str
    type: str
    default: str
    meaning: str
    range: str


@dataclass(frozen=True, slots=True)
class Section:
    """The keys of one dataclass of the schema, under their common path."""

    path: str
    summary: str
    keys: tuple[Key, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(tables())
        return 0
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}", encoding="utf-8")
    return 0


def tables() -> str:
    """Markdown: a heading and a table for each section."""
    parts = []
    for section in sections():
        parts += [f"## {_title(section.path)}", "", _linked(section.summary), ""]
        parts += ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
        parts += [
            f"| `{key.path}` | {key.type} | {key.default} | {key.range} | {key.meaning} |"
            for key in section.keys
        ]
        parts.append("")
    return "\n".join(parts).rstrip()


def sections() -> list[Section]:
    """All sections, the top level's first."""
    found = list(_sections(RunConfig, ""))
    place = 1 + next(i for i, section in enumerate(found) if section.path == "stages.N")
    return [*found[:place], *_sections(StackingConfig, "stages"), *found[place:]]


def _title(path: str) -> str:
    if path == "stages":
        return "`stages` as a policy"
    return f"`{path}`" if path else "Top level"


def _sections(schema: type, path: str) -> Iterator[Section]:
    hints = typing.get_type_hints(schema)
    meanings = attributes(schema)
    keys, below = [], []
    for field in dataclasses.fields(schema):
        dotted = f"{path}.{field.name}".lstrip(".")
        child, is_list = _dataclass_in(hints[field.name])
        text = meanings[field.name]
        text = text[0].upper() + text[1:]
        allowed = _RANGE.search(text)
        meaning = text[: allowed.start()] + "." if allowed else text
        if child is not None and not (path and child is GrowthConfig):
            below.append((child, f"{dotted}.N" if is_list else dotted))
        kind = _type(hints[field.name])
        keys.append(
            Key(dotted, kind, _default(field), _linked(meaning), allowed[1] if allowed else "")
        )
    yield Section(path, inspect.getdoc(schema).split("\n\n")[0].replace("\n", " "), tuple(keys))
    for child, where in below:
        yield from _sections(child, where)


def attributes(schema: type) -> dict[str, str]:
    """What the docstring's ``Attributes:`` say of each field, on one line, as a sentence."""
    _, found, text = inspect.getdoc(schema).partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", words) for name, words in entries} if found else {}


def _linked(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _dataclass_in(hint: Any) -> tuple[type | None, bool]:
    """The section that a key holds, and whether it holds a list of them."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), False
    for part in typing.get_args(hint):
        if dataclasses.is_dataclass(part):
            return typing.cast(type, part), typing.get_origin(hint) is tuple
    return None, False


def _type(hint: Any) -> str:
    """A type in words, with its allowed values where they are few."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in args)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is tuple:
        if args[-1] is ...:
            return f"list of {_type(args[0])}"
        return f"list of {len(args)} {_type(args[0])}s"
    if hint is type(None):
        return "null"
    return "mapping" if origin is dict or dataclasses.is_dataclass(hint) else _WORDS[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    return "required" if field.default_factory is dataclasses.MISSING else "its keys' defaults"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(part) for part in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    raise SystemExit(main())
