"""Where a model's layers are: the numbered list of modules that holds most of its parameters.

Only outermost lists count: one inside a layer, ``layers.3.experts.0``, is part of it.  A list's
name does not matter: ``transformer.h.N``, ``bert.encoder.layer.N``, ``blocks.N``.

A model may have several lists.  One with at least a quarter of the parameters of the largest could
be meant as well: the two halves of an encoder-decoder, of which one may have half as many layers,
or the towers of CLIP.  Draft heads, adapters and the vision towers of language models are smaller.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import PlanError

COMPARABLE = 0.25
_NUMBERED = re.compile(r"(?P<head>(?:.*?\.)??)(?P<layer>\d+)\.(?P<tail>.+)")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LayerName:
    """A parameter of a layer: the layer's number, and what follows it."""

    layer: int
    tail: str


@dataclass(frozen=True, slots=True)
class LayerStack:
    """A numbered list of layers.

    Attributes:
        head: what stands before the number, ``transformer.h.``.
        numbers: of the layers, rising.
    """

    head: str
    numbers: tuple[int, ...]

    @property
    def title(self) -> str:
        """``transformer.h.N``."""
        return f"{self.head}N"

    @property
    def pattern(self) -> str:
        """As a names file says it: ``transformer.h.{}``."""
        return f"{self.head}{{}}"

    def match(self, name: str) -> LayerName | None:
        """The layer that a parameter belongs to, or None if it belongs to none."""
        if not name.startswith(self.head):
            return None
        number, dot, tail = name[len(self.head) :].partition(".")
        return LayerName(int(number), tail) if number.isdecimal() and dot and tail else None

    def name(self, layer: int, tail: str) -> str:
        """A parameter's name."""
        return f"{self.head}{layer}.{tail}"


def layer_stacks(shapes: Mapping[str, Collection[int]]) -> list[LayerStack]:
    """The lists that could be the model's layers, the one with most parameters first.

    More than one have comparable sizes: nobody but the user knows which is meant.
    """
    sizes: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        if match := _NUMBERED.fullmatch(name):
            head = match["head"]
            sizes[head] = sizes.get(head, 0) + prod(shape)
            numbers.setdefault(head, set()).add(int(match["layer"]))
    largest = max(sizes.values(), default=0)
    heads = sorted(sizes, key=lambda head: -sizes[head])
    return [
        LayerStack(head, tuple(sorted(numbers[head])))
        for head in heads
        if sizes[head] >= COMPARABLE * largest
    ]


def find_layer_stack(
    shapes: Mapping[str, Collection[int]], names: ParamNames | None = None
) -> LayerStack | None:
    """The list of a model's layers; None if it has no list.

    Args:
        shapes: of all parameters, whole.
        names: what the user says of them.

    Raises:
        PlanError: if two lists are of comparable size, or the user's has no parameters.
    """
    if names is not None and names.layers is not None:
        return _named_stack(shapes, names.layers)
    stacks = layer_stacks(shapes)
    if len(stacks) > 1:
        listed = ", ".join(f"{s.title} with {len(s.numbers)}" for s in stacks)
        raise PlanError(
            f"the model has {len(stacks)} stacks of layers of comparable size: {listed}. Say in a "
            f"names file which is meant (--names FILE, names=, growth.names): "
            f'layers: "{stacks[0].pattern}"'
        )
    return stacks[0] if stacks else None


def largest_stack(
    shapes: Mapping[str, Collection[int]], names: ParamNames | None = None
) -> LayerStack | None:
    """The list that holds most parameters, or the user's: what never changes layers asks no more.

    Raises:
        PlanError: if the user's list has no parameters.
    """
    if names is not None and names.layers is not None:
        return _named_stack(shapes, names.layers)
    return next(iter(layer_stacks(shapes)), None)


def count_layers(shapes: Mapping[str, Collection[int]], names: ParamNames | None = None) -> int:
    """The number of layers in the largest list, or the user's."""
    stack = largest_stack(shapes, names)
    return len(stack.numbers) if stack else 0


def _named_stack(names: Iterable[str], pattern: str) -> LayerStack:
    head = pattern.removesuffix("{}")
    stack = LayerStack(head, ())
    names = list(names)
    numbers = {match.layer for name in names if (match := stack.match(name))}
    if not numbers:
        found = dict.fromkeys(m["head"] for n in names if (m := _NUMBERED.fullmatch(n)))
        there = ", ".join(f"{head}{{}}" for head in list(found)[:_SHOWN]) or "none"
        raise PlanError(
            f'layers: "{pattern}" of the names matches no parameter of this model. Its numbered '
            f"lists: {there}."
        )
    return LayerStack(head, tuple(sorted(numbers)))
