"""The one-pass AdamW against its formula in double precision and against torch's own."""

import functools
import math
import subprocess

import pytest
import torch

from lag_megatron.errors import LagError
from lag_megatron.kernels.adamw import (
    adamw_on_gpu,
    adamw_step,
    squared_norms,
)
from lag_megatron.kernels.common import build as build_module
from lag_megatron.kernels.common.build import build, cuda_command, nvcc_path
from lag_megatron.kernels.common.partition import Partition, Rates
from lag_megatron.kernels.cuda.adamw_cuda import SOURCE

RATES = Rates(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def partition(length, *, parts=(), gradient=torch.float32, weights=torch.float32, updates=3):
    """A partition after some updates, whose gradient lies in parts of these lengths."""
    draw = torch.Generator().manual_seed(length)
    master, exp_avg, noise = (torch.randn(length, generator=draw) for _ in range(3))
    lengths = [*parts] or [length]
    return Partition(
        master=master,
        exp_avg=exp_avg,
        exp_avg_sq=noise.square(),
        step=torch.tensor(float(updates)),
        weights=master.to(weights),
        gradients=[torch.randn(n, generator=draw).to(gradient) for n in lengths],
    )


def copy_of(given):
    values = {name: getattr(given, name).clone() for name in Partition.__slots__[:-1]}
    return Partition(**values, gradients=[g.clone() for g in given.gradients])


def formula(given, scale):
    """Master and moments by algorithm 2 of Loshchilov and Hutter, in double precision."""
    gradient = torch.zeros(given.master.numel(), dtype=torch.float64)
    joined = torch.cat([g.reshape(-1) for g in given.gradients]).double()
    gradient[: len(joined)] = joined * scale
    (beta1, beta2), step = RATES.betas, float(given.step) + 1
    exp_avg = beta1 * given.exp_avg.double() + (1 - beta1) * gradient
    exp_avg_sq = beta2 * given.exp_avg_sq.double() + (1 - beta2) * gradient**2
    first, second = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    master = given.master.double() * (1 - RATES.lr * RATES.weight_decay)
    return master - RATES.lr * first / (second.sqrt() + RATES.eps), exp_avg, exp_avg_sq


@pytest.fixture(params=["cpu", "triton"])
def update(request):
    """The update on a CPU, and the device's, which Triton's interpreter runs there."""
    if request.param == "cpu":
        return adamw_step
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here: the tests marked gpu run it")
    pytest.importorskip("triton")
    return functools.partial(adamw_on_gpu, by="triton")


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "parts"), [(1, ()), (1023, ()), (2500, (1, 700, 1024, 770))])
def test_an_update_is_the_formulas(update, length, parts, gradient, weights):
    given = partition(length, parts=parts, gradient=gradient, weights=weights)
    master, exp_avg, exp_avg_sq = formula(given, 0.25)
    update(given, RATES, torch.tensor(0.25))
    assert float(given.step) == 4
    torch.testing.assert_close(given.exp_avg.double(), exp_avg, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(given.exp_avg_sq.double(), exp_avg_sq, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(given.master.double(), master, rtol=2e-6, atol=1e-6)
    assert torch.equal(given.weights, given.master.to(weights))


def test_padding_has_no_gradient(update):
    given = partition(64, parts=(10, 40))
    master, *_ = formula(given, 1.0)
    update(given, RATES, torch.tensor(1.0))
    torch.testing.assert_close(given.master.double(), master, rtol=2e-6, atol=1e-6)


def test_more_gradients_than_masters_are_refused():
    given = partition(64, parts=(40, 30))
    before = given.master.clone()
    with pytest.raises(LagError, match="6 elements more than the 64 of their partition"):
        adamw_step(given, RATES, torch.tensor(1.0))
    assert torch.equal(given.master, before)


def test_gradients_that_lie_apart_or_differ_in_type():
    given, turned = (partition(64, parts=(24, 40)) for _ in range(2))
    first, second = turned.gradients
    second = second.to(torch.bfloat16)
    given.gradients[1] = second.float()
    turned.gradients[:] = [torch.stack([first, first], dim=1)[:, 0], second]
    assert not turned.gradients[0].is_contiguous()
    for each in (given, turned):
        adamw_step(each, RATES, torch.tensor(1.0))
    assert torch.equal(given.master, turned.master)
    assert float(squared_norms(turned.gradients)) == float(squared_norms(given.gradients))


def test_a_partition_of_nothing(update):
    given = partition(0, weights=torch.bfloat16)
    update(given, RATES, torch.tensor(1.0))
    assert float(given.step) == 4
    assert given.master.shape == (0,)


def test_gradients_that_lie_apart(update):
    """Every second element of a wider tensor, and a turned matrix."""
    given, apart = (partition(64, parts=(24, 40)) for _ in range(2))
    first, second = apart.gradients
    wide = torch.stack([first, first], dim=1)
    apart.gradients[:] = [wide[:, 0], second.view(5, 8).t().contiguous().t()]
    assert not any(gradient.is_contiguous() for gradient in apart.gradients)
    for each in (given, apart):
        update(each, RATES, torch.tensor(0.5))
    assert torch.equal(given.master, apart.master)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_changes_nothing(update, scale):
    given = partition(100, weights=torch.bfloat16)
    before = copy_of(given)
    update(given, RATES, torch.tensor(scale))
    for name in Partition.__slots__[:-1]:
        assert torch.equal(getattr(given, name), getattr(before, name)), name


def test_weights_that_are_not_numbers_stay_so(update):
    given = partition(32, weights=torch.bfloat16)
    given.master[::2] = math.nan
    update(given, RATES, torch.tensor(1.0))
    assert given.weights[::2].isnan().all()
    assert given.weights[1::2].isfinite().all()


@pytest.mark.parametrize("length", [16, 1 << 17, (1 << 18) + 7])
def test_parts_and_threads_do_not_show(length):
    """Masters and moments are those of torch's optimizer over the whole partition, bit for bit.

    But for the last elements, fewer than a vector, which torch computes one by one.
    """
    given = partition(length, parts=(1, length // 2, length - length // 2 - 1))
    master = given.master.clone().requires_grad_()
    master.grad = torch.cat(given.gradients).mul_(torch.tensor(0.3))
    options = {"lr": RATES.lr, "betas": RATES.betas, "weight_decay": RATES.weight_decay}
    optimizer = torch.optim.AdamW([master], fused=True, **options)
    optimizer.state[master] = {
        "step": given.step.clone(),
        "exp_avg": given.exp_avg.clone(),
        "exp_avg_sq": given.exp_avg_sq.clone(),
    }
    optimizer.step()
    adamw_step(given, RATES, torch.tensor(0.3))
    theirs = {"master": master.detach(), **optimizer.state[master]}
    whole = length // 16 * 16
    assert torch.equal(given.step, theirs.pop("step"))
    for name, expected in theirs.items():
        assert torch.equal(getattr(given, name)[:whole], expected[:whole]), name
        torch.testing.assert_close(getattr(given, name), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_summed_over_all_tensors(dtype):
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=draw).to(dtype) for n in (3, 800)]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(squared_norms(tensors)) == pytest.approx(expected, rel=1e-6)
    assert float(squared_norms([])) == 0


def test_nvcc_is_found_by_its_folders(tmp_path, monkeypatch):
    """CUDA_HOME first, then the PATH, then where it is installed by default."""
    folders = [tmp_path / name for name in ("home/bin", "path", "default")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(folders[1]))
    monkeypatch.setattr(build_module, "_CUDA_BIN", str(folders[2]))
    for folder in folders:
        assert nvcc_path() == str(folder / "nvcc")
        (folder / "nvcc").unlink()
    assert nvcc_path() is None


@pytest.mark.skipif(nvcc_path() is None, reason="no nvcc here: AdamW's CUDA kernel is not compiled")
def test_the_cuda_kernel_compiles(tmp_path):
    build(SOURCE, cuda_command(["80", "90"]), tmp_path / "adamw.so")
    symbols = subprocess.check_output(["nm", "-D", tmp_path / "adamw.so"], text=True)
    assert " T lag_adamw" in symbols


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["triton", "cuda"])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "first"), [(1, 0), (4096, 0), (100_003, 0), (5000, 2)])
def test_a_gpus_update_is_the_formulas(by, length, first, gradient, weights):
    """``first`` cuts elements off at the beginning, so that nothing is aligned to 16 bytes."""
    parts = (length // 2, length // 3)
    given = partition(length + first, parts=parts, gradient=gradient, weights=weights)
    values = {name: getattr(given, name).cuda() for name in Partition.__slots__[:-1]}
    for name in values.keys() - {"step"}:
        values[name] = values[name][first:]
    moved = Partition(**values, gradients=[g.cuda() for g in given.gradients])
    expected = Partition(
        **{name: value.cpu().clone() for name, value in values.items()}, gradients=given.gradients
    )
    master, exp_avg, exp_avg_sq = formula(expected, 0.25)
    adamw_on_gpu(moved, RATES, torch.tensor(0.25, device="cuda"), by=by)
    assert float(moved.step) == 4
    for found, right in zip(
        (moved.exp_avg, moved.exp_avg_sq, moved.master), (exp_avg, exp_avg_sq, master), strict=True
    ):
        torch.testing.assert_close(found.cpu().double(), right, rtol=2e-6, atol=1e-6)
    assert torch.equal(moved.weights, moved.master.to(weights))
    before = moved.master.clone()
    adamw_on_gpu(moved, RATES, torch.tensor(math.nan, device="cuda"), by=by)
    assert torch.equal(moved.master, before)
    assert float(moved.step) == 4
