"""When a loss means that a candidate has diverged."""

import math

from lag_megatron.config import GrowthConfig


def divergence(loss: float, growth: GrowthConfig, what: str, step: int) -> str:
    """Why a candidate has lost by a loss; empty if it has not.

    Args:
        loss: in nats per label.
        growth: settings of the event, with the largest loss that is allowed.
        what: whose loss it is, e.g. ``validation``.
        step: optimizer steps after growth.
    """
    if not math.isfinite(loss):
        return f"{what} loss is {loss} at step {step}"
    if loss > growth.max_loss:
        return f"{what} loss {loss:.4g} is above growth.max_loss {growth.max_loss} at step {step}"
    return ""
