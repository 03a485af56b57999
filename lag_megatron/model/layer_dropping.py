"""Layers that a training step may leave out (Random Path Training).

A layer that is left out returns its input: it computes and stores nothing, and its hooks, by which
ZeRO-3 fetches weights, do not run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from lag_megatron.planning.random_paths import LayerPath

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class DroppableLayer(TransformerLayer):
    """Megatron-Core's layer, which may be left out, and whose branches may be scaled.

    Attributes:
        runs: whether it is computed.
        branch_scale: what the outputs of attention and MLP are multiplied with, biases included,
            before dropout and the residual.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.runs, self.branch_scale = True, 1.0
        for name in ("self_attn_bda", "mlp_bda"):
            setattr(self, name, self._scaled(getattr(self, name)))

    # Not forward: before that DeepSpeed would fetch the biases that the layer adds for its parts.
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As Megatron-Core's block calls it; what comes in, where the layer is left out."""
        if not self.runs:
            return kwargs["hidden_states"], kwargs["context"]
        result: tuple[Tensor, Any] = super().__call__(*args, **kwargs)
        return result

    def _scaled(self, choose: Callable[[bool, bool], Add]) -> Callable[[bool, bool], Add]:
        """Bias, dropout and residual, with the branch scaled before them."""

        def chosen(training: bool, fused: bool) -> Add:
            add = choose(training, fused)

            def scaled(branch: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
                if self.branch_scale != 1.0:
                    output, bias = branch
                    bias = None if bias is None else bias * self.branch_scale
                    branch = (output * self.branch_scale, bias)
                return add(branch, residual, p)

            return scaled

        return chosen


@contextlib.contextmanager
def only_layers(model: torch.nn.Module, path: LayerPath) -> Iterator[None]:
    """While this is open, only the layers of ``path`` run."""
    layers = [module for module in model.modules() if isinstance(module, DroppableLayer)]
    assert len(layers) == path.num_layers, (len(layers), path)
    for number, layer in enumerate(layers):
        layer.runs, layer.branch_scale = number in path.layers, path.branch_scale
    try:
        yield
    finally:
        for layer in layers:
            layer.runs, layer.branch_scale = True, 1.0
