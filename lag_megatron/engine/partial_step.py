"""Steps that a part of the layers takes, and what DeepSpeed has to be told of the others.

Without ZeRO DeepSpeed fills in gradients of 0 for them, and so it does at stages 1 and 2.  At
stage 3 gradients live in buffers that are only ever written by layers that ran, and weights are
fetched ahead in the order of the step before.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from lag_megatron.engine.state import LiveState
from lag_megatron.layer_rates import frozen, slowed
from lag_megatron.model.layer_dropping import only_layers
from lag_megatron.planning.random_paths import LayerPath


@contextlib.contextmanager
def partial_step(
    engine: Any,
    live: Callable[[], LiveState],
    *,
    slow: tuple[Collection[int], float],
    path: LayerPath | None,
    freeze: bool,
) -> Iterator[None]:
    """While this is open, DeepSpeed's ``engine`` takes a step that not all layers take wholly.

    Args:
        engine: DeepSpeed's.
        live: its state on this rank, if it is needed.
        slow: layers that take a part of the step, and that part, from 0 to 1.
        path: the layers that are trained; None for all.
        freeze: whether weights and moments of the others stand still, instead of being moved on
            by decay and momentum.

    Raises:
        RunError: if a part of the step is asked for and no layers are named for it.
    """
    with contextlib.ExitStack() as held:
        if slow[1] < 1:
            held.enter_context(slowed(live(), *slow))
        if path is not None:
            held.enter_context(_on_path(engine, path))
            if freeze:
                held.enter_context(frozen(live(), path.skipped))
        yield


@contextlib.contextmanager
def _on_path(engine: Any, path: LayerPath) -> Iterator[None]:
    """While this is open, the layers of ``path`` run alone; the others get gradients of 0."""
    if engine.zero_optimization_partition_weights():
        _forget_last_step(engine.optimizer)
    with only_layers(engine.module, path):
        yield


def _forget_last_step(zero: Any) -> None:
    """At stage 3, drop its gradients, which layers left out would show again, and its order."""
    zero.grad_partitions_flat_buffer.zero_()
    coordinator = zero.parameter_offload.get_param_coordinator()
    # The next forward pass completes an order that is being recorded, and then fetches by it.
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
