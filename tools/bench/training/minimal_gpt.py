"""A minimal GPT-2 in plain torch, as fast as torch alone makes it: one of step.py's peers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lag_megatron.config import ModelConfig
from lag_megatron.model.attention import prefers_matmul_attention


class MinimalGpt(nn.Module):
    """Parameters have the names of transformers' GPT-2."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(config.seq_length, width),
                "h": nn.ModuleList(_Layer(config) for _ in range(config.num_layers)),
                "ln_f": nn.LayerNorm(width, eps=config.norm_eps),
            }
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean loss in nats of tokens and labels, both (b, s)."""
        parts = self.transformer
        place = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = parts["wte"](tokens) + parts["wpe"](place)
        for layer in parts["h"]:
            hidden = layer(hidden)
        logits = F.linear(parts["ln_f"](hidden), parts["wte"].weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.heads = config.num_attention_heads
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        joined, last = _Linear(width, 3 * width), _Linear(width, width)
        self.attn = nn.ModuleDict({"c_attn": joined, "c_proj": last})
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict({"c_fc": _Linear(width, inner), "c_proj": _Linear(inner, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn["c_proj"](self._attend(self.attn["c_attn"](self.ln_1(hidden))))
        inner = F.gelu(self.mlp["c_fc"](self.ln_2(hidden)), approximate="tanh")
        return hidden + self.mlp["c_proj"](inner)

    def _attend(self, joined: Tensor) -> Tensor:
        batch, length, _ = joined.shape
        parts = joined.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts
        if not prefers_matmul_attention(query):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            out = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return out.transpose(1, 2).reshape(batch, length, -1)


class _Linear(nn.Module):
    """A linear layer with weights as (in, out), as GPT-2 stores them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.t(), self.bias)
