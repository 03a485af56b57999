"""Adafactor at a learning rate that a schedule sets."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Added to squared gradients, so that what never had a gradient has a mean that can be divided by.
_TINY = 1e-30


class Adafactor(torch.optim.Adafactor):
    """Factored second moments (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 to 6).

    Options, states and update are those of torch.optim.Adafactor, so either can go on from the
    other's checkpoint, but for two things in which T5X, the trainer of T5 and UL2, differs too:

    - The step is ``lr`` times the parameter's own scale ``max(RMS(parameter), eps[1])``.  torch's
      takes ``min(lr, 1 / sqrt(step))``, so that of a schedule with a peak of 0.01 little would be
      left after 10,000 steps.
    - 1e-30 is added to squared gradients and that is all.  torch's bounds the mean of a matrix's
      squared gradients from below by 1.2e-7, the machine's epsilon, under which those of language
      models lie; ``eps[0]`` is not used here.

    ``d``, the bound on the root mean square of an update, and ``beta2_decay``, the power of the
    step that a new squared gradient weighs, have the values of the paper and of T5X, 1.0 and -0.8.
    T5X leaves matrices with a side below 128 unfactored; all are factored here, as by torch.
    Decay is ``lr * weight_decay`` times the parameter, as AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one optimizer step.

        A parameter without a gradient is left as it is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        weight = float(state["step"]) ** group["beta2_decay"]
        update = gradient * _inverse_roots(state, gradient.square().add_(_TINY), weight)
        scale = _root_mean_square(parameter).clamp(min=group["eps"][1])
        clip = (_root_mean_square(update) / group["d"]).clamp(min=1.0)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update.mul_(group["lr"] * scale / clip))


def _inverse_roots(state: dict[str, Any], squares: Tensor, weight: float) -> Tensor:
    """1 / sqrt of the estimated means of squared gradients, after ``squares`` were taken in."""
    if squares.dim() < 2:
        return _mean(state, "variance", squares, weight).rsqrt()
    rows = _mean(state, "row_var", squares.mean(-1, keepdim=True), weight)
    columns = _mean(state, "col_var", squares.mean(-2, keepdim=True), weight)
    # Roots before the product, which would underflow where gradients are tiny.
    return (rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt()


def _mean(state: dict[str, Any], name: str, value: Tensor, weight: float) -> Tensor:
    """The running mean ``name``, which begins as the first value."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    kept: Tensor = state[name]
    return kept.lerp_(value, weight)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.norm() / math.sqrt(values.numel())
