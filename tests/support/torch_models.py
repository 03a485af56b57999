"""Small transformers in plain torch under Megatron's names, and growth of their whole tensors.

``from torch_models import Stack, random_stack, grow_dense, state_of``.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lag_megatron.checkpoint.state.layout import Topology, make_layout
from lag_megatron.growth.apply.copy_plan import Move, ShardedModel, plan_rank
from lag_megatron.growth.growth_map import depth_map
from lag_megatron.growth.weight_init import fill

HIDDEN, FFN, VOCABULARY, LENGTH = 16, 24, 32, 8
GROUPS = 2  # query groups of all kinds; a Llama has two heads in each


class RMSNorm(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(HIDDEN)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, llama, causal):
        super().__init__()
        self.heads, self.rotary, self.causal = GROUPS * (2 if llama else 1), llama, causal
        self.size = HIDDEN // self.heads
        rows = (self.heads + 2 * GROUPS) * self.size
        self.linear_qkv = nn.Linear(HIDDEN, rows, bias=not llama)
        self.linear_proj = nn.Linear(HIDDEN, HIDDEN, bias=not llama)

    def forward(self, x):
        batch, length, _ = x.shape
        split = self.linear_qkv(x).view(batch, length, GROUPS, -1, self.size).transpose(1, 2)
        queries, key, value = split[..., :-2, :], split[..., -2, :], split[..., -1, :]
        each = self.heads // GROUPS  # queries of a group, side by side
        query = queries.transpose(2, 3).reshape(batch, self.heads, length, self.size)
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        if self.rotary:
            query, key = rotated(query), rotated(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.linear_proj(mixed.transpose(1, 2).reshape(batch, length, HIDDEN))


def rotated(x):
    length, size = x.shape[-2:]
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(size // 2, dtype=x.dtype)
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([pairs.real, pairs.imag], -1)


class MLP(nn.Module):
    def __init__(self, bias, gated):
        super().__init__()
        self.linear_fc1 = nn.Linear(HIDDEN, (2 if gated else 1) * FFN, bias=bias)
        self.linear_fc2 = nn.Linear(FFN, HIDDEN, bias=bias)
        self.gated = gated

    def forward(self, x):
        inner = self.linear_fc1(x)
        if self.gated:
            gate, up = inner.chunk(2, -1)
            return self.linear_fc2(F.silu(gate) * up)
        return self.linear_fc2(F.gelu(inner))


class Layer(nn.Module):
    def __init__(self, post, llama, norm):
        super().__init__()
        self.self_attention = Attention(llama, causal=not post)
        self.mlp = MLP(not llama, gated=llama)
        self.post = post
        if post:
            self.post_attn_layernorm, self.post_mlp_layernorm = norm(), norm()
        else:
            self.input_layernorm, self.pre_mlp_layernorm = norm(), norm()

    def forward(self, x):
        if self.post:
            x = self.post_attn_layernorm(x + self.self_attention(x))
            return self.post_mlp_layernorm(x + self.mlp(x))
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Stack(nn.Module):
    """Logits of tokens.

    Kinds: ``gpt`` (pre-LN), ``llama`` (RMSNorm, SwiGLU, RoPE, grouped queries, no biases),
    ``bert`` (post-LN, no mask).
    """

    def __init__(self, kind, layers, *, eps=1e-12):
        super().__init__()
        post, llama = kind == "bert", kind == "llama"

        def norm():
            return RMSNorm(eps) if llama else nn.LayerNorm(HIDDEN, eps=eps)

        self.embedding = nn.Module()
        self.embedding.word_embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.embedding.position_embeddings = nn.Embedding(LENGTH, HIDDEN)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(post, llama, norm) for _ in range(layers))
        self.decoder.final_layernorm = nn.Identity() if post else norm()
        self.output_layer = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        x = self.embedding.word_embeddings(tokens) + self.embedding.position_embeddings(places)
        for layer in self.decoder.layers:
            x = layer(x)
        return self.output_layer(self.decoder.final_layernorm(x))


def random_stack(kind, layers, *, seed=0, eps=1e-12):
    """A stack in fp64 whose weights, biases and norms are all far from what they start as."""
    model = Stack(kind, layers, eps=eps).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                parameter.copy_(name.endswith("weight") + 0.3 * noise)
            else:
                scale = 0.3 if parameter.dim() == 1 else 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(scale * noise)
    return model


def state_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def grow_dense(plan, tensors, state="fp32"):
    """Whole tensors of the grown model, by the product's own plan of one rank without ZeRO."""
    groups = [{name: tuple(tensor.shape) for name, tensor in tensors.items()}]
    growth = depth_map(plan, groups, query_groups=GROUPS)
    topology = Topology(zero_stage=0, data_size=1, tensor_size=1, precision="fp32")
    source = ShardedModel(make_layout(groups, topology), topology, groups[0], False)
    shapes = growth.groups[0]
    target = ShardedModel(make_layout(growth.groups, topology), topology, shapes, False)
    old = {part.container: tensors[name].flatten()
           for name, (part,) in source.layout.segments.items()}  # fmt: skip
    new = {c: torch.full((n,), math.nan, dtype=torch.float64)
           for c, n in target.layout.lengths.items()}  # fmt: skip
    segments = list(target.layout.segments_of_rank(0))
    for step in plan_rank(growth, source, target, state, segments=segments, tensor_rank=0):
        view = _view(new[step.target.container], step.target, step.shape)
        if isinstance(step, Move):
            view.copy_(_view(old[step.source.container], step.source, step.shape) * step.scale)
        else:
            fill(view, step.init, shape=step.full_shape, box=step.box)
    return {name: new[part.container].view(shapes[name])
            for name, (part,) in target.layout.segments.items()}  # fmt: skip


def _view(buffer, place, shape):
    return buffer.as_strided(shape, place.strides, place.offset)


def load(kind, layers, tensors, *, eps=1e-12):
    """A stack of these whole tensors; all of them, and nothing else."""
    model = Stack(kind, layers, eps=eps).double()
    model.load_state_dict(tensors)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    return model


def tokens(seed, batch=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
