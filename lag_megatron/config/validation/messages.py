"""Readable messages for what pydantic finds wrong: one line for each mistake."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from lag_megatron.config.schema.run import RunConfig

Location = tuple[int | str, ...]

_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
}


def describe_errors(
    error: ValidationError, tree: Mapping[str, Any], *, schema: Any = RunConfig
) -> list[str]:
    """A line for each mistake in ``tree``: path, value, what is allowed, nearest known key.

    A value that fits no member of a union is one mistake, and so is a mistake in the global
    ``growth`` that the stages inherit.
    """
    found: dict[Location, str] = {}
    for problem in error.errors():
        location = problem["loc"]
        if not location:
            return [f"must be a mapping (got {tree!r})."]
        if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            found[location] = _unknown_key(location, problem["input"], schema)
        elif problem["type"] in ("missing", "missing_argument"):
            found[location] = "required, but not given."
        else:
            location, kind = _walk(location, schema)
            allowed = _allowed(kind)
            if problem["type"] == "finite_number":
                allowed = allowed.replace("a number", "a finite number")
            found[location] = f"must be {allowed} (got {_value(tree, location)!r})."
    return _lines(found)


def truth_value_problems(tree: Any, *, schema: Any = RunConfig) -> list[str]:
    """A line for each true or false where a number is wanted, which pydantic takes for 1 or 0."""
    found: dict[Location, str] = {}
    for location, value in _truth_values(tree, ()):
        place, kind = _walk(location, schema)
        if place == location and not _takes_truth(kind):
            found[place] = f"must be {_allowed(kind)} (got {str(value).lower()})."
    return _lines(found)


def _truth_values(tree: Any, location: Location) -> Iterator[tuple[Location, bool]]:
    if isinstance(tree, bool):
        yield location, tree
    elif isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, inner in items:
            yield from _truth_values(inner, (*location, key))


def _takes_truth(schema: Any) -> bool:
    if _is_union(schema):
        return any(map(_takes_truth, typing.get_args(schema)))
    if typing.get_origin(schema) is typing.Literal:
        return any(isinstance(choice, bool) for choice in typing.get_args(schema))
    return schema in (bool, Any)


def _lines(found: Mapping[Location, str]) -> list[str]:
    return [
        f"{'.'.join(map(str, location))}: {text}"
        for location, text in found.items()
        if not (location[0] == "stages" and found.get(location[2:]) == text)
    ]


def _unknown_key(location: Location, value: Any, schema: Any) -> str:
    _, parent = _walk(location[:-1], schema)
    known = [f.name for f in dataclasses.fields(_without_none(parent))]
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown key (got {value!r}).{hint} Known keys: {', '.join(known)}."


def _walk(location: Location, schema: Any) -> tuple[Location, Any]:
    """The part of ``location`` that addresses a value, and the type the schema gives it.

    Below a union pydantic adds the name of the member it tried, which is no part of the path.
    """
    for depth, part in enumerate(location):
        child = _child(_without_none(schema), part)
        if child is None:
            return location[:depth], schema
        schema = child
    return location, schema


def _child(schema: Any, part: int | str) -> Any:
    if dataclasses.is_dataclass(schema):
        return typing.get_type_hints(schema).get(str(part))
    if isinstance(part, int) and typing.get_origin(schema) is tuple:
        return typing.get_args(schema)[0]
    return None


def _value(tree: Any, location: Location) -> Any:
    for part in location:
        tree = tree[part]
    return tree


def _allowed(schema: Any) -> str:
    """A type as text: ``int | Literal["auto"]`` is "a whole number or 'auto'"."""
    origin, args = typing.get_origin(schema), typing.get_args(schema)
    if _is_union(schema):
        return _join([_allowed(member) for member in args])
    if origin is typing.Literal:
        return _join([str(a).lower() if isinstance(a, bool) else repr(a) for a in args])
    if origin is tuple:
        count = "" if args[-1] is ... else f"{len(args)} "
        return f"a list of {count}{_plural(args[0])}"
    return _WORDS[schema][0] if schema in _WORDS else "a mapping"


def _plural(schema: Any) -> str:
    if _is_union(schema):
        return _join([_plural(member) for member in typing.get_args(schema)])
    if typing.get_origin(schema) is tuple:
        return f"lists of {_plural(typing.get_args(schema)[0])}"
    if typing.get_origin(schema) is typing.Literal:
        return _allowed(schema)
    return _WORDS[schema][1] if schema in _WORDS else "mappings"


def _join(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _without_none(schema: Any) -> Any:
    members = [m for m in typing.get_args(schema) if m is not type(None)]
    return members[0] if _is_union(schema) and len(members) == 1 else schema


def _is_union(schema: Any) -> bool:
    return typing.get_origin(schema) in (typing.Union, types.UnionType)
