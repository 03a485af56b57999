"""A smaller learning rate for some layers, or none, whatever the ZeRO stage.

A parameter group has one rate, and under ZeRO it is one flat buffer: groups for new layers would
change the layout of every checkpoint, and differ from candidate to candidate.  But the step that
AdamW takes, its decay included, and Adafactor's too, is proportional to the rate, and of the rate
the optimizers' states know nothing.  So a part of the step is the step with a part of the rate.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.megatron.param_names import LAYER
from lag_megatron.engine.state import LiveState
from lag_megatron.errors import RunError


@contextlib.contextmanager
def slowed(live: LiveState, layers: Collection[int], factor: float) -> Iterator[None]:
    """While this is open, parameters of ``layers`` take ``factor`` of each step, from 0 to 1.

    It happens inside the optimizer's step, so before DeepSpeed shares out the new weights.  A copy
    of this rank's masters of those layers is held meanwhile.

    Raises:
        RunError: if there are no layers: then nobody has said which are new.
    """
    if not layers:
        raise RunError(
            "optimizer.schedule.growth_warmup is 'new', but the state does not say which layers "
            "its last growth has added. Take 'all'."
        )
    with _around_steps(live, live.parts(_in(layers)), lambda part, old: old.lerp_(part, factor)):
        yield


@contextlib.contextmanager
def frozen(live: LiveState, layers: Collection[int]) -> Iterator[None]:
    """While this is open, steps leave weights and moments of ``layers`` as they are.

    A copy of this rank's part of their state is held meanwhile.
    """
    with _around_steps(live, live.parts(_in(layers), moments=True), lambda part, old: old):
        yield


def _in(layers: Collection[int]) -> Callable[[str], bool]:
    """Whether a parameter of this name belongs to one of these layers."""

    def belongs(name: str) -> bool:
        match = LAYER.match(name)
        return match is not None and int(match["layer"]) in layers

    return belongs


@contextlib.contextmanager
def _around_steps(
    live: LiveState,
    parts: Mapping[int, Sequence[Tensor]],
    what: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Replace parts of the state, after each step, by what is made of them and of their old values.

    Args:
        live: whose optimizer steps.
        parts: by the identity of the masters' buffer that they belong to.
        what: given a part and a copy of it from before the step, the values it gets.
    """
    before: list[tuple[Tensor, Tensor]] = []

    def keep(optimizer: Any, *unused: Any) -> None:
        # DeepSpeed shows the optimizer some of its tensors at a time.
        for tensor in (p for group in optimizer.param_groups for p in group["params"]):
            before.extend((part, part.clone()) for part in parts.get(id(tensor), ()))

    @torch.no_grad()
    def take_back(*unused: Any) -> None:
        for part, old in before:
            part.copy_(what(part, old))
        before.clear()

    hooks = (
        live.inner.register_step_pre_hook(keep),
        live.inner.register_step_post_hook(take_back),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
