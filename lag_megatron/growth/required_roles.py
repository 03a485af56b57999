"""The roles that a plan asks for, and what it says where they are not known."""

from collections.abc import Iterable, Mapping, Sequence

from lag_megatron.checkpoint.families.layer_stack import LayerStack
from lag_megatron.checkpoint.families.roles import FAMILIES, ModelRoles, find_roles
from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.errors import PlanError
from lag_megatron.growth.plan import GrowthPlan

_VECTOR = "norm_weight, norm_weight_zero_centred, bias, layer_scale or fixed"
_MATRIX = "branch_input, branch_output or fixed"


def needs_roles(plan: GrowthPlan) -> bool:
    """Whether a plan does more than copy layers."""
    return any(
        (origin.is_new and origin.init == "random")
        or origin.branch_scale != 1
        or origin.identity_norms
        or origin.zero_norms
        for origin in plan.layer_map
    )


def roles_for(
    plan: GrowthPlan,
    shapes: Mapping[str, Shape],
    stack: LayerStack | None,
    *,
    untrained: Iterable[str] = (),
    others: Iterable[str] = (),
) -> ModelRoles:
    """Roles of a model's parameters; of its layers all, if the plan asks for them, else any.

    Args:
        plan: what to do, with the user's names.
        shapes: of all parameters, whole.
        stack: the model's layers.
        untrained: names of those that are frozen.
        others: names of buffers and further names of parameters.

    Raises:
        PlanError: if the user's names do not fit the model, or a role is not known that the plan
            asks for.
    """
    is_needed = stack is not None and needs_roles(plan)
    if plan.names is None and not is_needed:
        return ModelRoles(stack, {}, None)
    roles = find_roles(shapes, stack, plan.names, untrained=untrained, others=others)
    if stack is None or not is_needed:
        return roles
    inside = [name for name in shapes if stack.match(name)]
    if any(origin.identity_norms or origin.zero_norms for origin in plan.layer_map):
        _require_table(plan, roles, stack, inside)
    if unknown := [name for name in inside if roles.of(name) is None]:
        raise PlanError(_unknown_roles(plan, shapes, stack, unknown))
    scales = any(origin.branch_scale != 1 for origin in plan.layer_map)
    if scales and not any(roles.is_branch_output(name) for name in inside):
        raise PlanError(
            f"operator {plan.operator!r} scales what a layer's branches put out, but no parameter "
            f"of the layers ({stack.title}) has the role branch_output. Give it in the names file, "
            "or take another operator."
        )
    if any(origin.identity_norms for origin in plan.layer_map):
        _require_post_norms(plan, roles, stack, inside)
    return roles


def _require_table(
    plan: GrowthPlan, roles: ModelRoles, stack: LayerStack, inside: Sequence[str]
) -> None:
    """Refuse an operator on norms for a layer of which roles are all that can be known."""
    if roles.family is not None:
        return
    tails = {match.tail for name in inside if (match := stack.match(name))}
    nearest = max(FAMILIES, key=lambda family: len(tails & family.layer.roles.keys()))
    others = sorted(tails - nearest.layer.roles.keys()) or sorted(nearest.layer.required - tails)
    titles = ", ".join(family.title for family in FAMILIES)
    raise PlanError(
        f"operator {plan.operator!r} has to know which norm and which matrices belong to which "
        f"branch. Roles do not say it, and no table has the names of this model's layers "
        f"({stack.title}): {nearest.title} differs in {', '.join(others)}. There are tables of "
        f"{titles}. Take 'llama_pro', to which roles are enough."
    )


def _require_post_norms(
    plan: GrowthPlan, roles: ModelRoles, stack: LayerStack, inside: Sequence[str]
) -> None:
    tails = {match.tail for name in inside if (match := stack.match(name))}
    if {roles.post_norm_branch(tail) for tail in tails} >= {"attention", "mlp"}:
        return
    assert roles.family, "looked for before"
    norms = [m for modules in roles.family.layer.post_norms.values() for m in modules]
    raise PlanError(
        f"operator {plan.operator!r} needs layers with {' and '.join(norms) or 'norms at the end'}"
        f", but this model's have none: it is for post-LN models, and this one has the layers of "
        f"{roles.family.title}. Take another operator."
    )


def _unknown_roles(
    plan: GrowthPlan, shapes: Mapping[str, Shape], stack: LayerStack, unknown: Sequence[str]
) -> str:
    found = {match.tail: shapes[n] for n in unknown if (match := stack.match(n))}
    tails = {match.tail for name in shapes if (match := stack.match(name))}
    lines = [
        f'  "{pattern}": ROLE  # {shape}: {_VECTOR if len(shape) < 2 else _MATRIX}'
        for tail, shape in found.items()
        for pattern in _patterns(stack, tail, tails)
    ]
    return "\n".join(
        [
            f"operator {plan.operator!r} with these options has to know the role of each parameter "
            f"of a layer, but no table has the names of this model's layers ({stack.title}). Write "
            "these lines into a file, a role in each, and give it by --names FILE (names= in "
            "Python, growth.names in a configuration):",
            "roles:",
            *lines,
        ]
    )


def _patterns(stack: LayerStack, tail: str, tails: Iterable[str]) -> list[str]:
    """Patterns of one parameter in every layer that match no other's."""
    if not any(other.endswith(f".{tail}") for other in tails):
        return [f"{stack.head}*.{tail}"]
    return [f"{stack.head}{'?' * n}.{tail}" for n in sorted({len(str(i)) for i in stack.numbers})]
