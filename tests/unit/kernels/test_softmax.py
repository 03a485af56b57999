"""The kernels of the cross-entropy against torch, in Triton (interpreted, on a GPU) and in C++."""

import pytest
import torch

from lag_megatron.kernels import softmax
from lag_megatron.kernels.cpu import softmax_cpu
from lag_megatron.model.linear_cross_entropy import linear_cross_entropy

pytest.importorskip("triton")
from lag_megatron.kernels.triton import softmax_triton

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: the tests marked gpu run it"
)


def rows(count, columns, dtype):
    draw = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(count, columns + 3, generator=draw)
    place = torch.randint(columns, (count,), generator=draw)
    is_mine = torch.rand(count, generator=draw) < 0.7
    return logits.to(dtype)[:, :columns], place, is_mine


@pytest.fixture(params=[pytest.param("triton", marks=interpreted), "cpu"])
def kernels(request):
    """Statistics and gradient of one language."""
    if request.param == "triton":
        return softmax_triton.statistics_triton, softmax_triton.to_gradient_triton
    return softmax_cpu.statistics_cpu, softmax_cpu.to_gradient_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 5), (4, 4096), (2, 9001), (0, 7)])
def test_rows_are_as_torch_finds_them(kernels, count, columns, dtype):
    logits, place, is_mine = rows(count, columns, dtype)
    wide = logits.double()
    top, sums = softmax.row_statistics(wide, place, is_mine)
    statistics, to_gradient = kernels
    found_top, found = statistics(logits, place, is_mine)
    torch.testing.assert_close(found_top.double(), top)
    torch.testing.assert_close(found.double(), sums, rtol=1e-5, atol=1e-5)
    draw = torch.Generator().manual_seed(0)
    factor, even, taken = (torch.rand(count, generator=draw) for _ in range(3))
    numbers = [t.double() for t in (factor, even)]
    softmax.logits_to_gradient(wide, top, *numbers, place, taken.double())
    to_gradient(logits, found_top, factor, even, place, taken)
    if dtype is torch.float32:
        torch.testing.assert_close(logits.double(), wide, rtol=1e-5, atol=1e-6)
    else:  # rounded once, to the nearest
        near = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(logits.double(), wide, rtol=near * 1.02, atol=1e-6)


def test_a_row_with_no_number_has_none_as_its_sum(kernels):
    logits, place, is_mine = rows(3, 5000, torch.float32)
    logits[1, 4500] = torch.nan
    _, sums = kernels[0](logits, place, is_mine)
    assert sums[2].isnan().tolist() == [False, True, False]


def test_fp16_is_torchs_on_a_cpu():
    assert not softmax.has_kernel(torch.float16, torch.device("cpu"))
    assert softmax.has_kernel(torch.bfloat16, torch.device("cpu"))


@interpreted
def test_a_gradient_with_no_number_stays_in_its_row():
    logits, place, _ = rows(3, 5000, torch.bfloat16)
    logits[1, 4500] = torch.nan
    factor, even, taken = torch.full((3, 3), 0.5)
    softmax_triton.to_gradient_triton(logits, torch.zeros(3), factor, even, place, taken)
    assert logits.isnan().any(dim=1).tolist() == [False, True, False]
    assert logits[1].isnan().sum() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_a_gpus_loss_and_gradients(dtype, smoothing, z_loss):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=draw).to(dtype)
    weight = (torch.randn(10_007, 64, generator=draw) / 8).to(dtype)
    labels = torch.randint(len(weight), (len(hidden),), generator=draw)
    mask = (torch.rand(len(hidden), generator=draw) < 0.8).float()
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "chunk": 50 * len(weight)}
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        tensors = [t.to(device, kind).requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*tensors, None, labels.to(device), mask.to(device), **options)
        loss.backward()
        found.append([loss.detach().cpu().double(), *(t.grad.cpu().double() for t in tensors)])
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for right, ours in zip(*found, strict=True):
        assert (ours - right).norm() <= tolerance * right.norm()
