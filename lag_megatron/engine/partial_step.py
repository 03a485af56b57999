"""Optimizer steps that some layers take only in part, or not at all, whatever the ZeRO stage.

Two things ask for it.  A grown model may warm up its new layers' learning rate, and a random path
trains some of the layers alone.

A parameter group has one learning rate, and under ZeRO it is one flat buffer: a group for the new
layers would change the layout of every checkpoint, and differ from candidate to candidate.  But the
step of AdamW, its decay included, and that of Adafactor are proportional to the learning rate, and
the optimizers' states do not depend on it.  So a step with a part of the learning rate is that part
of the step.

Layers that are left out get gradients of 0.  DeepSpeed fills these in without ZeRO and at stages 1
and 2.  At stage 3 gradients lie in buffers that only layers that ran write to, and weights are
fetched ahead in the order of the step before.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lag_megatron.engine.deepspeed_adapter import DeepSpeedAdapter
from lag_megatron.engine.state import EngineState
from lag_megatron.errors import RunError
from lag_megatron.model.layer_dropping import only_layers
from lag_megatron.planning.random_paths import LayerPath


@contextlib.contextmanager
def partial_step(
    adapter: DeepSpeedAdapter,
    state: Callable[[], EngineState],
    *,
    scaled: tuple[Collection[int], float],
    path: LayerPath | None,
    freeze: bool,
) -> Iterator[None]:
    """While this is open, the engine takes a step that not all layers take wholly.

    Args:
        adapter: of the engine.
        state: gives its state on this rank; called only if it is needed.
        scaled: layers with a learning rate of their own, and what theirs is multiplied by, from 0
            to 1.
        path: the layers that are trained; None for all.
        freeze: whether weights and moments of the others stay as they are, instead of being moved
            by decay and momentum.

    Raises:
        RunError: if a factor below 1 is given and no layers.
    """
    with contextlib.ExitStack() as contexts:
        if scaled[1] < 1:
            contexts.enter_context(scaled_layer_lr(state(), *scaled))
        if path is not None:
            contexts.enter_context(_on_path(adapter, path))
            if freeze:
                contexts.enter_context(frozen_layers(state(), path.skipped))
        yield


@contextlib.contextmanager
def scaled_layer_lr(state: EngineState, layers: Collection[int], factor: float) -> Iterator[None]:
    """While this is open, parameters of ``layers`` take ``factor`` of each step, from 0 to 1.

    It happens inside the optimizer's step, so before DeepSpeed gathers the new weights.  A copy of
    this rank's masters of those layers is held meanwhile.

    Raises:
        RunError: if there are no layers: then the state does not say which are new.
    """
    if not layers:
        raise RunError(
            "optimizer.schedule.growth_warmup is 'new', but the state does not say which layers "
            "its last growth has added. Take 'all'."
        )
    slices = state.slices(state.in_layers(layers))
    with _around_steps(state, slices, lambda new, old: old.lerp_(new, factor)):
        yield


@contextlib.contextmanager
def frozen_layers(state: EngineState, layers: Collection[int]) -> Iterator[None]:
    """While this is open, steps leave weights and moments of ``layers`` as they are.

    A copy of this rank's part of their state is held meanwhile.
    """
    slices = state.slices(state.in_layers(layers), moments=True)
    with _around_steps(state, slices, lambda new, old: old):
        yield


@contextlib.contextmanager
def _around_steps(
    state: EngineState,
    slices: Mapping[int, Sequence[Tensor]],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """After each step replace slices of the state by what is made of them and of their old values.

    Args:
        state: whose optimizer steps.
        slices: by the identity of the buffer of masters that they belong to.
        combine: given a slice and a copy of it from before the step, the values it gets.
    """
    before: list[tuple[Tensor, Tensor]] = []

    def copy_slices(optimizer: Any, *unused: Any) -> None:
        # DeepSpeed gives the optimizer some of its tensors at a time.
        for tensor in (p for group in optimizer.param_groups for p in group["params"]):
            before.extend((part, part.clone()) for part in slices.get(id(tensor), ()))

    @torch.no_grad()
    def replace_slices(*unused: Any) -> None:
        for part, old in before:
            part.copy_(combine(part, old))
        before.clear()

    hooks = (
        state.torch_optimizer.register_step_pre_hook(copy_slices),
        state.torch_optimizer.register_step_post_hook(replace_slices),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _on_path(adapter: DeepSpeedAdapter, path: LayerPath) -> Iterator[None]:
    """While this is open, the layers of ``path`` run alone; the others get gradients of 0."""
    adapter.prepare_partial_step()
    with only_layers(adapter.module, path):
        yield
