"""Core attention against dense scores, in double precision, with its masks and their gradients."""

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch.nn.functional as F  # noqa: E402

S, B, HEADS, SIZE = 7, 5, 6, 3


@pytest.fixture(params=["torch", "products"])
def way(request, monkeypatch):
    """Both ways, whichever this CPU would take."""
    from lag_megatron.model import attention

    monkeypatch.setattr(
        attention, "prefers_matmul_attention", lambda query: request.param == "products"
    )


def attention(kind, groups):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from lag_megatron.model.attention import SDPACoreAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=groups
    )
    return SDPACoreAttention(config, 1, AttnMaskType[kind], "self", attention_dropout=0.0)


def heads(groups):
    generator = torch.Generator().manual_seed(groups)
    shapes = ((S, B, HEADS, SIZE), (S, B, groups, SIZE), (S, B, groups, SIZE))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def dense(query, key, value, visible):
    """Every score written out; ``visible`` is (b, query, key)."""
    repeats = HEADS // key.shape[2]
    key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
    scores = torch.einsum("sbhk,tbhk->bhst", query, key) / math.sqrt(SIZE)
    weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhst,tbhk->sbhk", weights, value).flatten(2)


def compare(found, expected, inputs):
    assert found.shape == (S, B, HEADS * SIZE)
    assert (found - expected).abs().max() < 1e-12
    direction = torch.randn(expected.shape, dtype=torch.float64)
    pairs = [torch.autograd.grad((out * direction).sum(), inputs) for out in (found, expected)]
    for one, other in zip(*pairs, strict=True):
        assert (one - other).abs().max() < 1e-12


def visible_with_prefix(prefix):
    visible = torch.ones(S, S, dtype=torch.bool).tril().repeat(len(prefix), 1, 1)
    for row, length in enumerate(prefix):
        visible[row, :length, :length] = True
        visible[row, length:, :length] = True
    return visible


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(
    "prefix", [[0, 0, 0, 0, 0], [3, 0, 7, 0, 1], [2, 3, 4, 5, 6], [0, 0, 0, 0, 4]]
)
def test_prefixes_are_seen_in_both_directions(prefix, groups, way):
    from lag_megatron.model.attention import prefix_mask

    inputs = heads(groups)
    order = sorted(range(B), key=lambda row: prefix[row] > 0)
    lengths = [prefix[row] for row in order if prefix[row]]
    mask = prefix_mask(torch.tensor(lengths), S) if lengths else None
    found = attention("causal", groups)(*(t[:, order] for t in inputs), mask)
    expected = dense(*inputs, visible_with_prefix(prefix))[:, order]
    compare(found, expected, inputs)


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("lengths", [[7, 7, 7, 7, 7], [7, 4, 1, 6, 2]])
def test_padding_is_hidden(lengths, groups, way):
    from lag_megatron.model.attention import padding_mask

    is_token = torch.arange(S) < torch.tensor(lengths)[:, None]
    inputs = heads(groups)
    mask = padding_mask(is_token)
    found = attention("padding", groups)(*inputs, mask)
    compare(found, dense(*inputs, is_token[:, None].expand(B, S, S)), inputs)


def test_only_rows_with_a_prefix_are_masked(monkeypatch):
    """The others stay with the kernel for causal attention."""
    from lag_megatron.model.attention import prefix_mask

    calls = []
    real = F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append((len(query), options["is_causal"], options["attn_mask"]))
        return real(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    core, inputs = attention("causal", 2), heads(2)
    core(*inputs, None)
    assert calls == [(B, True, None)]
    mask = prefix_mask(torch.tensor([3, 2]), S)
    calls.clear()
    core(*inputs, mask)
    assert sorted((rows, causal) for rows, causal, _ in calls) == [(2, False), (3, True)]


def test_products_drop_weights_as_torch_does():
    """The share that is kept is scaled up: the mean over draws is the attention without dropout."""
    from lag_megatron.model.attention import matmul_attention

    torch.manual_seed(0)
    heads = [torch.randn(1, 2, S, SIZE) for _ in range(3)]
    whole = matmul_attention(*heads, None, scale=1.0)
    draws = [matmul_attention(*heads, None, scale=1.0, dropout=0.3) for _ in range(4000)]
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(torch.stack(draws).mean(0), whole, rtol=0, atol=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 130])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kind", ["causal", "rows", "padding", "none"])
def test_one_pass_softmax_attends_as_torch_does(kind, groups, length, dtype):
    """Values and gradients against fp64, on views with gaps as the layers give them."""
    from lag_megatron.kernels.cpu.attention_cpu import attend_cpu

    draw = torch.Generator().manual_seed(length)
    shapes = [(length, B, count, 2 * SIZE) for count in (HEADS, groups, groups)]
    given = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in given]
    mask = {
        "rows": torch.rand(B, 1, length, length, generator=draw) < 0.4,
        "padding": torch.rand(B, 1, 1, length, generator=draw) < 0.4,
    }.get(kind)
    if mask is not None:
        mask[..., 0] = False  # something is seen
    parts, exact = ([t[..., :SIZE].permute(1, 2, 0, 3) for t in side] for side in (given, wide))
    out = attend_cpu(*parts, mask, causal=kind == "causal", scale=SIZE**-0.5)
    right = F.scaled_dot_product_attention(
        *exact,
        attn_mask=None if mask is None else ~mask,
        is_causal=kind == "causal",
        enable_gqa=True,
    )
    grad = torch.randn(right.shape, generator=draw).to(dtype)
    out.backward(grad)
    right.backward(grad.double())
    tolerance = 2e-6 if dtype is torch.float32 else 1e-2
    for ours, expected in [
        (out, right),
        *((a.grad, b.grad) for a, b in zip(given, wide, strict=True)),
    ]:
        assert ours.dtype is dtype
        assert (ours.double() - expected).norm() <= tolerance * expected.norm() + 1e-6


def test_one_pass_softmax_of_nothing_and_of_no_number():
    from lag_megatron.kernels.cpu.attention_cpu import attend_cpu

    empty = torch.zeros(0, 2, 4, 3, requires_grad=True)
    attend_cpu(empty, empty, empty, None, causal=True, scale=1.0).sum().backward()
    assert empty.grad.shape == empty.shape
    query, key, value = (torch.randn(1, 1, 4, 3) for _ in range(3))
    key[0, 0, 2, 1] = torch.nan
    out = attend_cpu(query, key, value, None, causal=True, scale=1.0)
    assert out.isnan().any(-1).flatten().tolist() == [False, False, True, True]


def test_the_committed_table_supports_the_choice(monkeypatch):
    """Where products are taken on a CPU with matrix instructions they were faster."""
    from lag_megatron.model.attention import prefers_matmul_attention

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    results = Path(__file__).parents[3] / "tools" / "bench" / "results" / "attention.json"
    figures = json.loads(results.read_text())["figures"]
    taken = []
    for name, ratio in figures.items():
        _, dtype, length = name.split("_")
        if prefers_matmul_attention(torch.zeros(1, 1, int(length), 1, dtype=getattr(torch, dtype))):
            taken.append(name)
            assert ratio > 1, name
    assert len(taken) == 8
