"""Transformer layers replayed as CUDA graphs, forward and backward, at fixed addresses.

Experimental, and off by default (``parallel.cuda_graphs``): tests replay with a stand-in for CUDA's
capture on a CPU, and it has never run on a GPU.  Without the option nothing calls it.

A whole backward pass cannot be one graph: DeepSpeed's hooks on gradients keep count in Python, and
reduce on another stream.  A layer's can.  Its parameters' gradients leave the graph as an ordinary
autograd node's, so that the hooks find them as they do without.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from lag_megatron.errors import ConfigError

# Graphs of a layer that are kept; batches of further shapes run without.
MAX_SHAPES = 2
_WARM_UPS = 3


class Capture(Protocol):
    """Makes something that can be run again of work on tensors at fixed addresses."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work before it is captured, so that libraries have chosen what they call."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Any, Callable[[], None]]:
        """The tensors that hold the work's results, and what computes them anew."""


class CudaGraphCapture:
    """Capture by CUDA graphs, which share their memory: what one frees, the next takes."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run the work on a stream of its own."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(stream)

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Any, Callable[[], None]]:
        """Capture; other threads may call CUDA meanwhile: NCCL's does, and that of the batches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


def capture_layers(model: torch.nn.Module, make: Callable[[], Capture] = CudaGraphCapture) -> None:
    """Have every transformer layer of a model replay its training passes.

    A batch's backward pass has to end before the next one's forward pass, and layers must draw no
    random numbers.  Whatever changes parameters has to leave them where they are; else they are
    captured again.

    Args:
        model: with its parameters where they stay.
        make: a capture for each graph; by CUDA graphs.

    Raises:
        ConfigError: if there is no GPU to make them.
    """
    if make is CudaGraphCapture and not torch.cuda.is_available():
        raise ConfigError("parallel.cuda_graphs: there is no GPU here. Set it to false.")
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            vars(layer)["forward"] = _Forward(layer, make)


class _Forward:
    """A layer's ``forward``: what is captured in training, Megatron's own otherwise."""

    def __init__(self, layer: TransformerLayer, make: Callable[[], Capture]) -> None:
        self._layer, self._plain, self._make = layer, layer.forward, make
        self._parameters = [p for p in layer.parameters() if p.requires_grad]
        self._graphs: dict[object, _Graph] = {}
        self._addresses: list[int] = []

    def __call__(self, *, hidden_states: Tensor, **others: Any) -> tuple[Tensor, Any]:
        given = {name: value for name, value in others.items() if isinstance(value, Tensor)}
        unsupported = [n for n, value in others.items() if value is not None and n not in given]
        assert not unsupported, f"arguments that cannot be captured: {unsupported}"
        graph = None
        if self._layer.training and torch.is_grad_enabled():
            graph = self._graph_for(hidden_states, given)
        if graph is None:
            return self._plain(hidden_states=hidden_states, **others)  # type: ignore[no-any-return]
        graph.take(given)
        return _Replay.apply(graph, hidden_states, *self._parameters), None

    def _graph_for(self, hidden: Tensor, given: Mapping[str, Tensor]) -> "_Graph | None":
        addresses = [p.data_ptr() for p in self._parameters]
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        key = (_kind(hidden), *((name, _kind(value)) for name, value in sorted(given.items())))
        if key not in self._graphs and len(self._graphs) < MAX_SHAPES:
            self._graphs[key] = _Graph(self._plain, self._parameters, hidden, given, self._make())
        return self._graphs.get(key)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype


class _Graph:
    """A layer's passes over batches of one shape."""

    def __init__(
        self,
        plain: Callable[..., tuple[Tensor, Any]],
        parameters: list[torch.nn.Parameter],
        hidden: Tensor,
        given: Mapping[str, Tensor],
        capture: Capture,
    ) -> None:
        self.hidden = hidden.detach().clone().requires_grad_()
        self._given = {name: value.detach().clone() for name, value in given.items()}
        self._taken: dict[str, tuple[Tensor, int]] = {}
        self._plain, self._parameters = plain, parameters
        self._made: Tensor | None = None
        self.calls = 0
        self.grad_output = torch.zeros_like(hidden)
        capture.warm_up(lambda: (self._run_forward(), self._run_backward()))
        self._made = None  # its parameters' nodes remember the stream of the warm-up
        (self.output,), self.forward = capture.record(self._run_forward)
        (self.grad_hidden, self._flat), self.backward = capture.record(self._run_backward)
        self._made = None  # and the capture's, on which hooks would run in every step

    def take(self, given: Mapping[str, Tensor]) -> None:
        """Copy further arguments to their places, those that are there already excepted."""
        for name, value in given.items():
            known, version = self._taken.get(name, (None, 0))
            if known is not value or version != value._version:
                self._given[name].copy_(value)
                self._taken[name] = value, value._version

    def gradients(self) -> list[Tensor]:
        """Those of the parameters, which the next replay does not change: they may be kept."""
        flat = self._flat.clone()
        parts = flat.split([p.numel() for p in self._parameters])
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def _run_forward(self) -> tuple[Tensor]:
        with torch.enable_grad():
            self._made, _ = self._plain(hidden_states=self.hidden, **self._given)
        return (self._made.detach(),)

    def _run_backward(self) -> tuple[Tensor, Tensor]:
        assert self._made is not None, "a backward pass follows its forward pass"
        hidden, *others = torch.autograd.grad(
            self._made, [self.hidden, *self._parameters], self.grad_output
        )
        return hidden, torch.cat([grad.reshape(-1) for grad in others])


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, hidden, *parameters):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            graph.hidden.copy_(hidden)
        graph.forward()
        graph.calls += 1
        ctx.graph, ctx.call = graph, graph.calls
        return graph.output.detach()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        graph = ctx.graph
        assert ctx.call == graph.calls, "another forward pass has overwritten this one's values"
        graph.grad_output.copy_(grad)
        graph.backward()
        return None, graph.grad_hidden.detach(), *graph.gradients()
