"""Megatron-Core's MLP with its activation in one pass, where that is the faster form."""

from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lag_megatron.kernels.cpu.activation_cpu import activate, one_pass_wins


class OnePassMLP(MLP):
    """Parameters and their names are Megatron's."""

    kind: str  # of KINDS
    parts: MLPSubmodules

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, self.parts, ffn_hidden_size=config.ffn_hidden_size)

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output (s, b, d), and the bias that is still to be added to it."""
        if not one_pass_wins(hidden_states, self.kind):
            found: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return found
        inner, bias = self.linear_fc1(hidden_states)
        output, output_bias = self.linear_fc2(activate(inner, bias, self.kind))
        return output, output_bias


def one_pass_mlp(kind: str, parts: MLPSubmodules) -> type[OnePassMLP]:
    """The MLP of an activation, for Megatron's spec slot ``mlp``.

    A class and not a spec: every Megatron layer warns of specs for MLPs other than its own.
    """
    return type("OnePassMLP", (OnePassMLP,), {"kind": kind, "parts": parts})
