"""A smaller learning rate for some layers, whatever the ZeRO stage.

A parameter group has one rate, and under ZeRO it is one flat buffer: groups for new layers would
change the layout of every checkpoint, and differ from candidate to candidate.  But the step that
AdamW takes, its decay included, and Adafactor's too, is proportional to the rate, and of the rate
the optimizers' states know nothing.  So a part of the step is the step with a part of the rate.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.names import LAYER
from lag_megatron.errors import RunError
from lag_megatron.live import LiveState


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

    def belongs(name: str) -> bool:
        match = LAYER.match(name)
        return match is not None and int(match["layer"]) in layers

    parts = live.parts(belongs)
    before: list[tuple[Tensor, Tensor]] = []

    def keep(optimizer: Any, *unused: Any) -> None:
        # DeepSpeed shows the optimizer some of its tensors at a time.
        for tensor in (p for group in optimizer.param_groups for p in group["params"]):
            before.extend((part, part.clone()) for part in parts.get(id(tensor), ()))

    @torch.no_grad()
    def take_back(*unused: Any) -> None:
        for part, old in before:
            part.copy_(old.lerp_(part, factor))
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
