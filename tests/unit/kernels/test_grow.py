"""Writing a grown state in one pass: every kernel against plain indexing, bit for bit."""

import functools
import math
import subprocess

import numpy as np
import pytest
import torch

from lag_megatron.kernels.common.build import build, cuda_command, nvcc_path
from lag_megatron.kernels.common.runs import TILE, WriteRun, run_table
from lag_megatron.kernels.cuda.grow_cuda import SOURCE
from lag_megatron.kernels.grow import write_runs, write_runs_by_torch, write_runs_on_gpu

KINDS = [torch.float32, torch.bfloat16, torch.float16]


def write_by(name):
    if name == "torch":
        return write_runs_by_torch
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here: the tests marked gpu run it")
    pytest.importorskip("triton")
    return functools.partial(write_runs_on_gpu, by="triton")


@pytest.fixture(params=["torch", "triton"])
def write(request):
    """The reference, and the device's, which Triton's interpreter runs on a CPU."""
    return write_by(request.param)


def buffers(length, kind, device="cpu"):
    """Old values of an old state, and the new state's buffers full of others."""
    draw = torch.Generator().manual_seed(length)
    old = torch.randn(length + 8, generator=draw).to(device)
    target = torch.full((length + 8,), 7.0, device=device)
    return old, target, torch.full((length + 8,), 9.0, dtype=kind, device=device)


def expected_of(old, length, shift, scale, kind):
    """fp32 products and their nearest in the weights' type, by double precision and numpy."""
    values = old[shift : shift + length].cpu().double().numpy() * float(np.float32(scale))
    master = torch.from_numpy(values.astype(np.float32))
    return master, master.to(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.7])
@pytest.mark.parametrize(
    ("length", "shift", "start"),
    [(1, 0, 0), (64, 0, 0), (1023, 1, 2), (TILE, 4, 4), (2 * TILE + 37, 0, 3)],
)
def test_scaled_copies_at_any_place(write, length, shift, start, scale, kind):
    """``shift`` and ``start`` move source and target off the boundaries of 16 bytes."""
    old, target, weights = buffers(length, kind)
    here = slice(start, start + length)
    write([WriteRun(target[here], old[shift : shift + length], scale, weights[here])])
    master, rounded = expected_of(old, length, shift, scale, kind)
    assert torch.equal(target[here], master)
    assert torch.equal(weights[here], rounded)
    for buffer, filled in ((target, 7.0), (weights, 9.0)):  # and nothing beside it
        assert (buffer[:start] == filled).all()
        assert (buffer[start + length :] == filled).all()


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_several_buffers_in_one_launch(write, kind):
    """Copies, constants and values that are there, into masters and moments at once."""
    old, master, weights = buffers(3000, kind)
    _, moment, _ = buffers(3000, kind)
    drawn = torch.linspace(-1, 1, 500)
    master[2000:2500] = drawn
    write(
        [
            WriteRun(master[:2000], old[1000:3000], 0.5, weights[:2000]),
            WriteRun(moment[5:2005], old[:2000]),
            WriteRun(master[2000:2500], master[2000:2500], 1.0, weights[2000:2500]),
            WriteRun(master[2500:3000], None, 0.1, weights[2500:3000]),
            WriteRun(moment[2005:2010], None, 0.0),
        ]
    )
    tenth = torch.full((500,), 0.1)
    assert torch.equal(master[:3000], torch.cat([old[1000:3000] * 0.5, drawn, tenth]))
    assert torch.equal(weights[:3000], master[:3000].to(kind))
    assert torch.equal(moment[5:2005], old[:2000])
    assert (moment[2005:2010] == 0).all()
    assert (moment[2010:] == 7).all()
    assert (moment[:5] == 7).all()


def test_values_that_are_there_are_not_written_again():
    target = torch.ones(8)
    run = WriteRun(target[:4], target[:4])
    assert run.source is not run.target  # two views; the same object is what says it
    same = target[:4]
    rows, _ = run_table([run, WriteRun(same, same)])
    assert (rows[:, 4] // 2).tolist() == [0, 1]


def test_what_is_no_number_stays_so(write):
    old, target, weights = buffers(100, torch.bfloat16)
    old[:100:2] = math.nan
    old[1] = math.inf
    write([WriteRun(target[:100], old[:100], 0.5, weights[:100])])
    for found in (target[:100], weights[:100]):
        assert found[::2].isnan().all()
        assert found[1] == math.inf
        assert found[3::2].isfinite().all()


def test_nothing_to_write():
    write_runs([])
    empty = torch.empty(0)
    write_runs([WriteRun(empty, empty.clone(), 1.0, empty.to(torch.bfloat16))])
    rows, scales = run_table([])
    assert (rows.shape, scales.shape) == ((0, 5), (0,))
    write_runs_on_gpu([WriteRun(empty, None)], by="triton")


def test_runs_with_gaps_are_refused():
    wide = torch.zeros(8)
    for run in (
        WriteRun(wide[::2], wide[:4].clone()),
        WriteRun(wide[:4], torch.zeros(8)[::2]),
        WriteRun(wide.view(2, 4), None),
        WriteRun(wide, torch.zeros(7)),
        WriteRun(wide.bfloat16(), None),
    ):
        with pytest.raises(AssertionError):
            run_table([run])


def test_tiles_cover_each_run_once():
    target, weights = torch.zeros(25), torch.zeros(25, dtype=torch.bfloat16)
    source = torch.zeros(24)
    runs = [
        WriteRun(target[:20], source[1:21], 2.0, weights[:20]),
        WriteRun(target[20:], None, 3.0),
    ]
    rows, scales = run_table(runs, tile=8)
    assert rows[:, 3].tolist() == [8, 8, 4, 5]
    assert scales.tolist() == [2, 2, 2, 3]
    assert (rows[:, 0] - target.data_ptr()).tolist() == [0, 32, 64, 80]
    assert (rows[:3, 1] - source.data_ptr()).tolist() == [4, 36, 68]
    assert (rows[:3, 2] - weights.data_ptr()).tolist() == [0, 16, 32]
    assert rows[3, 1:3].tolist() == [0, 0]


def test_bytes_are_those_of_one_pass():
    target, source = torch.zeros(10), torch.zeros(10)
    weights = torch.zeros(10, dtype=torch.bfloat16)
    assert WriteRun(target, source, 1.0, weights).bytes_moved == 10 * (4 + 4 + 2)
    assert WriteRun(target, None).bytes_moved == 10 * 4
    assert WriteRun(target, target, 1.0, weights).bytes_moved == 10 * (4 + 2)


@pytest.mark.skipif(nvcc_path() is None, reason="no nvcc here: growth's CUDA kernel is not built")
def test_the_cuda_kernel_compiles(tmp_path):
    build(SOURCE, cuda_command(["80", "90"]), tmp_path / "grow.so")
    symbols = subprocess.check_output(["nm", "-D", tmp_path / "grow.so"], text=True)
    assert " T lag_grow" in symbols


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["triton", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("length", "shift", "start"), [(1, 0, 0), (100_003, 0, 0), (5000, 1, 2)])
def test_a_gpu_writes_what_the_reference_does(by, kind, pinned, length, shift, start):
    old, target, weights = buffers(length, kind, "cuda")
    here = slice(start, start + length)
    source = old.cpu().pin_memory() if pinned else old
    _, moment, _ = buffers(length, kind, "cuda")
    run = WriteRun(target[here], source[shift : shift + length], 0.3, weights[here])
    write_runs_on_gpu([run, WriteRun(moment[here], None, 0.25)], by=by)
    master, rounded = expected_of(old, length, shift, 0.3, kind)
    assert torch.equal(target[here].cpu(), master)
    assert torch.equal(weights[here].cpu(), rounded)
    assert (moment[here] == 0.25).all()
    assert (target[start + length :] == 7).all()
    assert (moment[start + length :] == 7).all()
