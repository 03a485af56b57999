"""Activations in one pass on a CPU against torch's operations in double precision."""

import json
from pathlib import Path

import pytest
import torch

from lag_megatron.kernels.cpu.activation_cpu import (
    KINDS,
    activate,
    activate_by_torch,
    one_pass_wins,
)

RESULTS = Path(__file__).parents[3] / "tools" / "bench" / "results" / "elementwise.json"
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 5), (2, 7, 33), (4, 1024), (70, 1000), (0, 8)]


def inputs(shape, kind, dtype, *, bias=True):
    draw = torch.Generator().manual_seed(shape[-1])
    width = shape[-1] * (2 if kind == "swiglu" else 1)
    hidden = 3 * torch.randn(*shape[:-1], width, generator=draw)
    added = torch.randn(width, generator=draw)
    tensors = [hidden, added] if bias else [hidden]
    return [t.to(dtype).requires_grad_() for t in tensors]


def both(tensors, kind, grad):
    """Values and gradients of the kernel, and those of torch in fp64."""
    found = []
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for form, given in ((activate, tensors), (activate_by_torch, wide)):
        out = form(given[0], given[1] if len(given) > 1 else None, kind)
        out.backward(grad.to(out.dtype))
        found.append([out.detach(), *(t.grad for t in given)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_torchs(kind, bias, shape, dtype):
    tensors = inputs(shape, kind, dtype, bias=bias)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    rtol = 2e-6 if dtype is torch.float32 else 2**-8  # rounded once
    for number, (ours, right) in enumerate(both(tensors, kind, grad)):
        assert ours.dtype is dtype
        near = 1e-4 if number == 2 else 4e-6  # the bias's is a sum over rows
        torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=near)


@pytest.mark.parametrize("kind", KINDS)
def test_far_values_saturate(kind):
    far = torch.tensor([-1e4, -300.0, -90.0, -14.0, 0.0, 14.0, 90.0, 300.0])
    width = len(far)
    hidden = (torch.cat([far, torch.ones(width)]) if kind == "swiglu" else far)[None]
    for ours, right in both([hidden.requires_grad_()], kind, torch.ones(1, width)):
        torch.testing.assert_close(ours.double(), right, rtol=2e-6, atol=1e-25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_where_it_is(kind, dtype):
    hidden, bias = inputs((3, 40), kind, dtype)
    with torch.no_grad():
        hidden[1, 7] = torch.nan
    out = activate(hidden, bias, kind)
    out.sum().backward()
    assert out.isnan().nonzero().tolist() == [[1, 7]]
    assert set(map(tuple, hidden.grad.isnan().nonzero().tolist())) >= {(1, 7)}
    assert not hidden.grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_views_with_gaps_are_read_right(kind):
    hidden, bias = inputs((6, 9, 16), kind, torch.float32)
    gaps = hidden.transpose(0, 1)
    out = activate(gaps, bias, kind)
    torch.testing.assert_close(out, activate(gaps.contiguous(), bias, kind), rtol=0, atol=0)
    (wide,) = torch.autograd.grad(out, hidden, torch.ones(1).expand(out.shape))
    whole = activate(hidden, bias, kind)
    (right,) = torch.autograd.grad(whole, hidden, torch.ones_like(whole))
    torch.testing.assert_close(wide, right, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind):
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensors = inputs((600, 700), kind, torch.bfloat16)
        out = activate(*tensors, kind)
        out.sum().backward()
        found.append([out, *(t.grad for t in tensors)])
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_what_is_not_in_the_table_is_torchs(monkeypatch):
    assert one_pass_wins(torch.zeros(1), "gelu")
    assert not one_pass_wins(torch.zeros(1, dtype=torch.float64), "gelu")
    assert not one_pass_wins(torch.zeros(1, device="meta"), "gelu")
    monkeypatch.setattr("lag_megatron.kernels.cpu.activation_cpu.builds_for_cpu", lambda: False)
    assert not one_pass_wins(torch.zeros(1), "gelu")


def test_the_committed_table_supports_the_choice():
    """Where one pass is taken it was faster at every size measured."""
    figures = json.loads(RESULTS.read_text())["figures"]
    ratios = {
        name: value
        for name, value in figures.items()
        if not name.endswith("_ms") and not name.startswith("residual_")
    }
    assert len(ratios) == 18
    for name, ratio in ratios.items():
        kind, dtype = next(
            (k, d) for k in KINDS for d in DTYPES if name.startswith(f"{k}_{str(d)[6:]}_")
        )
        assert not one_pass_wins(torch.zeros(1, dtype=dtype), kind) or ratio > 1, name
