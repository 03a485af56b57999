"""Which states an optimizer keeps of each parameter, and their shapes."""

from typing import Literal

from lag_megatron.checkpoint.state.box import Shape

State = Literal["fp32", "exp_avg", "exp_avg_sq", "row_var", "col_var", "variance"]
Optimizer = Literal["adamw", "adafactor"]
AdamState = Literal["fp32", "exp_avg", "exp_avg_sq"]

# The roles in a growth map, whatever the optimizer: weights, mean of the gradient, mean of its
# square.  They are also AdamW's states.
STATES: tuple[AdamState, ...] = ("fp32", "exp_avg", "exp_avg_sq")
_STATES_OF: dict[Optimizer, tuple[State, ...]] = {
    "adamw": STATES,
    "adafactor": ("fp32", "row_var", "col_var", "variance"),
}
_FACTORS: tuple[State, ...] = ("row_var", "col_var")
MOMENTS: frozenset[str] = frozenset({"exp_avg", "exp_avg_sq", *_STATES_OF["adafactor"][1:]})


def states_of(optimizer: Optimizer, shape: Shape | None = None) -> tuple[State, ...]:
    """The states of a parameter of ``shape``; without a shape, all states of the optimizer.

    Adafactor (Shazeer and Stern 2018, section 3) keeps the means of a matrix's squared gradients
    over its columns and over its rows, ``row_var`` and ``col_var``, and every element's
    ``variance`` of a vector.
    """
    if optimizer == "adamw" or shape is None:
        return _STATES_OF[optimizer]
    return ("fp32", *(_FACTORS if len(shape) > 1 else ("variance",)))


def state_shape(state: State, shape: Shape) -> Shape:
    """The shape of a state of a parameter of ``shape``, as torch.optim.Adafactor stores it."""
    if state == "row_var":
        return (*shape[:-1], 1)
    if state == "col_var":
        return (*shape[:-2], 1, shape[-1])
    return shape


def adam_state_of(state: State) -> AdamState:
    """The role of a state in a growth map; all of Adafactor's are means of squared gradients."""
    if state in ("fp32", "exp_avg"):
        return state
    return "exp_avg_sq"
