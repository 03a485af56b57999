"""Products in bf16 on CPUs without instructions for them: the values, the gradients, and when."""

import pytest
import torch

from lag_megatron.model.bf16_emulation import _Copies, emulate_bf16_matmuls, needs_bf16_emulation
from lag_megatron.model.linear_cross_entropy import linear_cross_entropy

CPU = torch.device("cpu")


def test_what_a_cpu_can_do_decides(monkeypatch):
    assert not needs_bf16_emulation(torch.float32, CPU)
    assert not needs_bf16_emulation(torch.bfloat16, torch.device("cuda"))
    for supported in (True, False):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=supported: known
        )
        assert needs_bf16_emulation(torch.bfloat16, CPU) is not supported


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_rounds_its_product_once(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16)
    hidden = torch.randn(3, 7, 24, dtype=torch.bfloat16, requires_grad=True)
    wide = torch.nn.functional.linear(
        hidden.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    emulate_bf16_matmuls(torch.nn.Sequential(layer))
    out = layer(hidden)
    assert out.dtype is torch.bfloat16
    assert (out.float() != wide.float().bfloat16().float()).float().mean() < 0.01
    torch.testing.assert_close(out.double(), wide, rtol=2**-8, atol=2**-8)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    exact = gradient.flatten(0, 1).double().t() @ hidden.detach().flatten(0, 1).double()
    assert layer.weight.grad.dtype is hidden.grad.dtype is torch.bfloat16
    torch.testing.assert_close(layer.weight.grad.double(), exact, rtol=2**-7, atol=2**-6)
    with torch.no_grad():
        layer.weight.zero_()
    assert not layer(hidden).any() or bias  # weights are looked up anew


@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 24)])
def test_backward_holds_no_wide_copy(shape, monkeypatch):
    """What is kept between forward and backward is bf16; gradients are those of kept copies."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, dtype=torch.bfloat16)
    hidden = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    wide = [t.detach().float().requires_grad_() for t in (hidden, layer.weight, layer.bias)]
    kept, keep = [], _Copies.keep

    def watched(copies, tensor):
        kept.append(keep(copies, tensor))
        return kept[-1]

    monkeypatch.setattr(_Copies, "keep", watched)
    emulate_bf16_matmuls(torch.nn.Sequential(layer))
    out = layer(hidden)
    assert [tensor.dtype for tensor, _ in kept] == [torch.bfloat16] * 2
    assert {tensor.data_ptr() for tensor, _ in kept} == {hidden.data_ptr(), layer.weight.data_ptr()}
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.nn.functional.linear(*wide).bfloat16().backward(grad)
    for ours, right in zip((hidden, layer.weight, layer.bias), wide, strict=True):
        assert torch.equal(ours.grad, right.grad.bfloat16())


def test_the_loss_head_takes_wide_products(monkeypatch):
    torch.manual_seed(1)
    hidden, weight = (torch.randn(n, 16, dtype=torch.bfloat16) for n in (40, 64))
    labels, mask = torch.randint(64, (40,)), torch.ones(40)
    exact = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().t(), labels, reduction="sum"
    )
    found = {}
    for wide in (True, False):
        monkeypatch.setattr(
            "lag_megatron.model.linear_cross_entropy.needs_bf16_emulation",
            lambda dtype, device, answer=wide: answer,
        )
        found[wide] = float(linear_cross_entropy(hidden, weight, None, labels, mask))
    assert abs(found[True] - float(exact)) < 1e-3
    assert found[False] == pytest.approx(float(exact), rel=1e-2)
