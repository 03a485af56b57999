"""What each parameter of a model is for: from the families' tables and from the user's patterns.

A table is taken for a model only if it has every name of its layers, and the layers have what the
table requires.  A name that some other model shares with it says nothing.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lag_megatron.checkpoint.families import bert, gpt, llama, torch_layers
from lag_megatron.checkpoint.families.family import Branch, Family
from lag_megatron.checkpoint.families.layer_stack import LayerStack
from lag_megatron.checkpoint.families.megatron_layer import MEGATRON_LAYER
from lag_megatron.config.schema.param_names import ParamNames, Role
from lag_megatron.errors import PlanError

FAMILIES: tuple[Family, ...] = (
    gpt.MEGATRON,
    bert.MEGATRON,
    llama.MEGATRON,
    gpt.TRANSFORMERS,
    bert.TRANSFORMERS,
    llama.TRANSFORMERS,
    torch_layers.ENCODER,
    torch_layers.DECODER,
)
_SHOWN = 5
_MEGATRON_NAME = re.compile(r"(?:decoder|encoder)\.layers\.\d+\.(?P<tail>.+)")


@dataclass(frozen=True)
class ModelRoles:
    """Roles of one model's parameters.

    Attributes:
        stack: the model's layers.
        by_name: roles by whole name, as far as they are known.
        family: whose table the layers are in; None where there is none.
    """

    stack: LayerStack | None
    by_name: Mapping[str, Role]
    family: Family | None

    def of(self, name: str) -> Role | None:
        """The role of a parameter; None where it is not known."""
        return self.by_name.get(name)

    def is_branch_output(self, name: str) -> bool:
        """Whether a parameter makes a branch's output: the projection's matrix or its bias."""
        role = self.of(name)
        if role == "bias":
            role = self.of(f"{name.removesuffix('.bias')}.weight")
        return role == "branch_output"

    def post_norm_branch(self, tail: str) -> Branch | None:
        """The branch after which a post-LN layer's norm stands; None for what is no such norm."""
        norms = self.family.layer.post_norms if self.family else {}
        module = tail.rpartition(".")[0]
        return next((branch for branch, modules in norms.items() if module in modules), None)


def find_roles(
    names: Iterable[str],
    stack: LayerStack | None,
    given: ParamNames | None = None,
    *,
    untrained: Iterable[str] = (),
    others: Iterable[str] = (),
) -> ModelRoles:
    """Roles of a model's parameters.

    Args:
        names: of all parameters.
        stack: the model's layers.
        given: the user's patterns, which come before the tables.
        untrained: those of ``names`` that are frozen; where nothing else is known they are fixed.
        others: names of buffers and further names of parameters, which patterns may match too.

    Raises:
        PlanError: if a pattern matches nothing, or two match one name.
    """
    names = list(names)
    by_user = _given_roles([*dict.fromkeys([*names, *others])], given.roles if given else {})
    tails: dict[str, bool] = {}  # of layers: whether the user has said the role of all of them
    for name in names:
        if stack and (match := stack.match(name)):
            tails[match.tail] = tails.get(match.tail, True) and name in by_user
    family = _family_of(names, tails, stack)
    known: dict[str, Role] = dict.fromkeys(untrained, "fixed")
    if family:
        known |= {n: role for n in names if (role := _table_role(family, stack, n)) is not None}
    return ModelRoles(stack, known | by_user, family)


@functools.cache
def megatron_role(name: str) -> Role | None:
    """The role of a parameter that has Megatron-Core's name, in whichever model."""
    ends = {**MEGATRON_LAYER.roles}
    for family in (gpt.MEGATRON, bert.MEGATRON, llama.MEGATRON):
        ends |= family.outside
    return next((role for end, role in ends.items() if _ends(name, end)), None)


def foreign_name(names: Iterable[str]) -> str | None:
    """The first name that no GPT or BERT of Megatron-Core has; None if all could be its."""
    outside = {**gpt.MEGATRON.outside, **bert.MEGATRON.outside, **llama.MEGATRON.outside}
    for name in names:
        match = _MEGATRON_NAME.fullmatch(name)
        if (match["tail"] not in MEGATRON_LAYER.roles) if match else (name not in outside):
            return name
    return None


def _given_roles(names: list[str], patterns: Mapping[str, Role]) -> dict[str, Role]:
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise PlanError(
                f"the pattern {pattern!r} of the names matches no parameter of this model. "
                f"Correct it or leave it out. The model's {len(names)} parameters: {shown}."
            )
        for name in matched:
            if name in found:
                raise PlanError(
                    f"the patterns {found[name]!r} and {pattern!r} of the names both match {name}. "
                    "Make them disjoint, so that each name has one role."
                )
            found[name] = pattern
    return {name: patterns[pattern] for name, pattern in found.items()}


def _family_of(
    names: list[str], tails: Mapping[str, bool], stack: LayerStack | None
) -> Family | None:
    """The family whose table has the layers' names; of several, that which has most others."""
    fitting = [
        family
        for family in FAMILIES
        if family.layer.required <= tails.keys()
        and all(said or tail in family.layer.roles for tail, said in tails.items())
    ]
    return max(
        fitting,
        key=lambda f: sum(_table_role(f, stack, name) is not None for name in names),
        default=None,
    )


def _table_role(family: Family, stack: LayerStack | None, name: str) -> Role | None:
    match = stack.match(name) if stack else None
    if match:
        return family.layer.roles.get(match.tail)
    return next((role for end, role in family.outside.items() if _ends(name, end)), None)


def _ends(name: str, end: str) -> bool:
    """Whether a name ends so, from a dot on."""
    return name == end or name.endswith(f".{end}")
