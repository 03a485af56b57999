"""Checks that values of JSON have their members, each of its type."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lag_megatron.errors import LagError
from lag_megatron.small_files import describe_kind

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
}
_LONGEST = 60


def require_schema(
    value: Any, schema: Any, *, where: object, what: str, error: type[LagError], advice: str = ""
) -> Any:
    """``value`` itself, which has all required members, each of the type that the schema gives it.

    Args:
        value: as JSON was read.
        schema: a ``TypedDict``, or a type of such.
        where: what the message begins with.
        what: what it should be, with its article.
        error: the kind of error to raise.
        advice: one or more sentences on what to do.

    Raises:
        LagError: of the kind ``error``, naming the first member that is missing or of another type.
    """
    from pydantic import ValidationError  # here: not every program reads such files

    try:
        _adapter(schema).validate_python(value)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        found = _found(value, first)
        raise error(f"{where}: expected {what}, but {found}. {advice}".rstrip()) from None
    return value


@cache
def _adapter(schema: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _found(value: Any, problem: Any) -> str:
    place, held = _walk(value, problem["loc"])
    name = ".".join(map(str, place)) or "it"
    if problem["type"] == "missing":
        return f"{'.'.join(map(str, (*place, problem['loc'][-1])))} is missing"
    return f"{name} is {_shown(held)}, expected {_expected(problem)}"


def _walk(value: Any, location: Sequence[int | str]) -> tuple[list[int | str], Any]:
    """The part of a location that addresses a value; pydantic adds names of types to it."""
    place: list[int | str] = []
    for part in location:
        try:
            value = value[part]
        except (LookupError, TypeError):
            break
        place.append(part)
    return place, value


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return describe_kind(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _expected(problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    for limit, words in (("ge", "or more"), ("le", "or less")):
        if limit in context:
            return f"{context[limit]:,} {words}"
    if kind == "finite_number":
        return "a finite number"
    return _EXPECTED.get(kind.partition("_")[0], "another value")
