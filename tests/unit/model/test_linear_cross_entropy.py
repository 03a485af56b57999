"""The chunked output layer with its loss against torch's own, in fp64 and below."""

import pytest
import torch
import torch.nn.functional as F

from lag_megatron.model.linear_cross_entropy import VocabShard, linear_cross_entropy


def inputs(rows, width, vocabulary, dtype, *, seed=0, bias=True):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64) / width**0.5
    offset = torch.randn(vocabulary, generator=draw, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,), generator=draw)
    mask = torch.rand(rows, generator=draw).round(decimals=1)
    mask[::3] = 0.0
    tensors = [hidden, weight, offset if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors], labels, mask


def reference(tensors, labels, mask, *, smoothing=0.0, z_loss=0.0):
    logits = F.linear(*tensors)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * wide.logsumexp(dim=1).square()
    return (losses * mask.to(losses.dtype)).sum()


def gradients(loss, tensors):
    (2.5 * loss).backward()
    found = [None if t is None else t.grad.clone() for t in tensors]
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return found


@pytest.mark.parametrize("chunk", [1, 40, 137, 10**9])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 0.1)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_torch_in_fp64(chunk, smoothing, z_loss, bias):
    tensors, labels, mask = inputs(29, 7, 13, torch.float64, bias=bias)
    theirs = reference(tensors, labels, mask, smoothing=smoothing, z_loss=z_loss)
    expected = gradients(theirs, tensors)
    ours = linear_cross_entropy(
        *tensors, labels, mask, label_smoothing=smoothing, z_loss=z_loss, chunk=chunk
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(gradients(ours, tensors), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_lower_precisions_are_as_near_to_fp64_as_torch_is(dtype, tolerance):
    tensors, labels, mask = inputs(64, 16, 100, dtype)
    rounded = [t.detach().double().requires_grad_() for t in tensors]
    truth = gradients(reference(rounded, labels, mask), rounded)
    theirs = gradients(reference(tensors, labels, mask), tensors)
    loss = linear_cross_entropy(*tensors, labels, mask, chunk=700)
    assert loss.dtype is torch.float32
    for mine, torchs, right in zip(gradients(loss, tensors), theirs, truth, strict=True):
        scale = right.norm()
        assert (mine.double() - right).norm() <= tolerance * scale
        assert (mine.double() - right).norm() <= 2 * (torchs.double() - right).norm() + 1e-7 * scale


def test_inputs_that_are_not_contiguous_and_frozen_ones():
    tensors, labels, mask = inputs(12, 6, 9, torch.float64, bias=False)
    hidden, weight, _ = tensors
    turned = hidden.detach().t().contiguous().t().requires_grad_()
    frozen = weight.detach()
    linear_cross_entropy(turned, frozen, None, labels, mask, chunk=20).backward()
    reference([hidden, frozen, None], labels, mask).backward()
    torch.testing.assert_close(turned.grad, hidden.grad, rtol=1e-11, atol=1e-12)
    assert frozen.grad is None


def test_no_rows_and_no_weights():
    tensors, labels, mask = inputs(5, 4, 6, torch.float32)
    hidden, weight, bias = tensors
    for loss in (
        linear_cross_entropy(hidden[:0], weight, bias, labels[:0], mask[:0]),
        linear_cross_entropy(hidden, weight, bias, labels, torch.zeros_like(mask)),
    ):
        assert loss.item() == 0.0
        loss.backward()
        assert not weight.grad.any()


def test_labels_of_rows_without_weight_do_not_matter():
    tensors, labels, mask = inputs(9, 4, 6, torch.float32)
    wild = torch.where(mask == 0, -100, labels)
    expected = linear_cross_entropy(*tensors, labels, mask)
    assert linear_cross_entropy(*tensors, wild, mask).item() == expected.item()


def test_what_is_not_a_number_stays_so():
    tensors, labels, mask = inputs(9, 4, 6, torch.float32)
    poisoned = tensors[0].detach().clone()
    poisoned[1, 2] = float("nan")
    assert linear_cross_entropy(poisoned, *tensors[1:], labels, mask).isnan()


def test_large_logits_do_not_overflow():
    tensors, labels, mask = inputs(9, 4, 6, torch.float32)
    large = [(t.detach() * 1e4).requires_grad_() for t in tensors]
    theirs = reference(large, labels, mask)
    torch.testing.assert_close(linear_cross_entropy(*large, labels, mask), theirs)


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    tensors, labels, mask = inputs(96, 4, 50, torch.float32)
    honest, seen = F.linear, []

    def linear(*arguments):
        seen.append(honest(*arguments))
        return seen[-1]

    monkeypatch.setattr("lag_megatron.model.linear_cross_entropy.F.linear", linear)
    linear_cross_entropy(*tensors, labels, mask, chunk=400)
    assert len(seen) > 1
    assert max(logits.numel() for logits in seen) <= 400


def test_a_whole_vocabulary_is_the_default():
    assert VocabShard() == VocabShard(first=0, group=None)
