"""Files that are filled by several threads at once, and files that share a template."""

import errno
import os
import random
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import xxhash

from lag_megatron.checkpoint.state.layout import Container, Segment
from lag_megatron.checkpoint.state.region import Region
from lag_megatron.checkpoint.state.spec import PlaceholderTensors
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.writer import file_writer, pieces
from lag_megatron.checkpoint.writer.context import WriteContext
from lag_megatron.checkpoint.writer.file_template import FileTemplateCache
from lag_megatron.checkpoint.writer.file_writer import write_spans
from lag_megatron.checkpoint.writer.ordered_pool import OrderedPool
from lag_megatron.checkpoint.writer.pieces import Span
from lag_megatron.checkpoint.zero.writer import write_objects
from lag_megatron.errors import CheckpointError


@contextmanager
def joined(work):
    """Three threads help."""
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


class Numbers:
    """Fills a region with its elements' own numbers."""

    def prefetch(self, region):
        pass

    def __call__(self, region, buffer):
        for _, segment in region.segments:
            values = torch.arange(segment.start, segment.start + segment.length)
            buffer[segment.offset : segment.offset + segment.length] = values


def region(length, state="fp32"):
    return Region(state, (("p", Segment(0, length, Container(0, 0), 0)),), length)


def test_pieces_are_finished_in_order_by_whoever_is_there():
    pool, finished, second = OrderedPool(iter(range(200))), [], threading.Event()

    def work(number):
        if number == 0:
            assert second.wait(60), "nobody else has begun a piece"
        else:
            second.set()
        time.sleep(random.random() / 2000)
        return lambda: finished.append(number)

    with joined(lambda: pool.run([work])):
        pool.run([work])
    assert finished == list(range(200))


def test_a_thread_comes_back_when_what_it_took_is_finished():
    """Until then its buffers are read, by whoever is about the finishing."""
    pool, finished, taker, at_back = OrderedPool(iter(range(2))), [], [], []
    begun, left, may_finish = (threading.Event() for _ in range(3))

    def slow(number):
        begun.set()
        assert may_finish.wait(60)
        return lambda: finished.append(number)

    def fast(number):
        taker.append(threading.current_thread())
        left.set()
        return lambda: finished.append(number)

    def run():
        assert begun.wait(60)
        pool.run([fast, fast])
        if threading.current_thread() in taker:
            at_back.append(list(finished))

    def release():
        assert left.wait(60)
        time.sleep(0.05)  # in which the other thread would come back
        may_finish.set()

    with joined(run), joined(release):
        pool.run([slow])
    assert at_back == [[0, 1]]


def test_one_thread_fails_and_the_others_end():
    pool, finished, failures = OrderedPool(iter(range(10**9))), [], []

    def work(number):
        if number == 50:
            raise OSError("no room")
        return lambda: finished.append(number)

    def run():
        try:
            pool.run([work])
        except OSError as error:
            failures.append(str(error))

    with joined(run):
        run()
    assert failures == ["no room"]
    assert finished == list(range(len(finished)))
    assert len(finished) <= 50


def test_a_thread_that_waits_comes_back_when_another_fails():
    """What it took will never be finished: the disk was full one piece before."""
    pool, begun, left = OrderedPool(iter(range(2))), threading.Event(), threading.Event()

    def slow(number):
        begun.set()
        assert left.wait(60)
        time.sleep(0.05)  # in which the other thread begins to wait
        raise OSError("no room")

    def fast(number):
        left.set()
        return lambda: None

    def run():
        assert begun.wait(60)
        pool.run([fast, fast])

    waiting = threading.Thread(target=run, daemon=True)
    waiting.start()
    with pytest.raises(OSError, match="no room"):
        pool.run([slow])
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1 << 22, 1 << 12])
def test_rows_that_lie_as_columns(block, dtype, tmp_path, monkeypatch):
    """Matrices of 96 x 40 among others, turned whole or some rows at a time, by four threads."""
    monkeypatch.setattr(pieces, "_BLOCK_BYTES", block)
    monkeypatch.setattr(pieces, "_WINDOW_BYTES", 1 << 10)
    monkeypatch.setattr(file_writer, "_SHARED_BYTES", 1 << 10)
    rows, width, size = 96, 40, dtype.itemsize
    spans, at = [], 8
    for _ in range(3):
        spans.append(Span(at, dtype, region(rows * width), width))
        spans.append(Span(spans[-1].end, dtype, region(7)))
        at = spans[-1].end + 5
    file, counts = tmp_path / "file", []
    file.write_bytes(b"\xaa" * (at + 3))
    entry = write_spans(file, spans, Numbers(), WriteContext(counts.append, share_work=joined))
    data = file.read_bytes()
    assert entry == {"size": at + 3, "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    assert sum(counts) == 3 * (rows * width + 7) * size
    turned = torch.arange(rows * width).to(dtype).view(rows, width).t().contiguous()
    others = torch.arange(7).to(dtype)
    expected = b"\xaa" * 8
    for _ in range(3):
        expected += b"".join(t.view(torch.uint8).numpy().tobytes() for t in (turned, others))
        expected += b"\xaa" * 5
    assert data == expected + b"\xaa" * 3


def test_each_state_has_a_checksum_of_its_own(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(4096))
    spans = [
        Span(64, torch.float32, region(100)),
        Span(464, torch.float32, region(100, "exp_avg")),
        Span(1024, torch.float32, region(200)),
    ]
    entry = write_spans(file, spans, Numbers())
    apart, data = entry[manifest.STATES_APART], file.read_bytes()
    assert {name: there["runs"] for name, there in apart.items()} == {
        "fp32": [[64, 464], [1024, 1824]],
        "exp_avg": [[464, 864]],
        "rest": [[0, 64], [864, 1024], [1824, 4096]],
    }
    for there in apart.values():
        parts = b"".join(data[begin:end] for begin, end in there["runs"])
        assert there["xxh3_128"] == xxhash.xxh3_128(parts).hexdigest()


def test_a_template_gives_the_bytes_that_torch_gives(tmp_path):
    shapes = [(3, 5), (3, 5), (5, 3), (3, 5), (0,), (0,), (150, 150), (150, 150)]
    templates = FileTemplateCache()
    for number, shape in enumerate(shapes):
        for extra in ({}, {"cat_dim": 0}, {"cat_dim": 1}, {"vocab_tensor": True}):
            written = []
            for folder, kept in ((f"a{number}", None), (f"b{number}", templates)):
                place = tmp_path / f"{folder}{sorted(extra.items())}"
                place.mkdir()
                placeholders = PlaceholderTensors()
                values = placeholders(region(torch.Size(shape).numel()), shape)
                objects = {**extra, "param": values}
                counts = []
                context = WriteContext(counts.append)
                entry = write_objects(
                    place / "fp32.pt", objects, placeholders, Numbers(), context, kept
                )
                assert sum(counts) == 4 * values.numel()
                written.append((entry, (place / "fp32.pt").read_bytes()))
            assert written[0] == written[1]
            found = torch.load(place / "fp32.pt", weights_only=True)
            assert found == {**extra, "param": found["param"]}
            expected = torch.arange(found["param"].numel(), dtype=torch.float32).view(shape)
            assert torch.equal(found["param"], expected)


def test_a_template_is_of_one_step(tmp_path):
    templates, found = FileTemplateCache(), []
    for step in (3.0, 4.0, 3.0):
        (tmp_path / str(len(found))).mkdir()
        file = tmp_path / str(len(found)) / "step.pt"
        write_objects(
            file, torch.tensor(step), PlaceholderTensors(), Numbers(), WriteContext(), templates
        )
        found.append(torch.load(file, weights_only=True))
    assert found == [3.0, 4.0, 3.0]


SMALL, LONGER = (3, 5), (150, 150)  # put together in memory, or too long for that


def write_from_template(file, shape, templates):
    placeholders = PlaceholderTensors()
    values = placeholders(region(torch.Size(shape).numel()), shape)
    write_objects(file, {"param": values}, placeholders, Numbers(), WriteContext(), templates)


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        *((SMALL, call) for call in ("open", "pwrite", "fsync")),
        *((LONGER, call) for call in ("open", "ftruncate", "pwrite", "pread", "fsync")),
    ],
)
def test_a_disk_that_fails_leaves_nothing_of_a_file_from_a_template(
    shape, call, tmp_path, monkeypatch
):
    templates, file = FileTemplateCache(), tmp_path / "fp32.pt"
    write_from_template(file, shape, templates)
    opened = len(os.listdir("/proc/self/fd"))

    def full(*unused):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=f"^{file}: cannot write: No space left"):
            write_from_template(file, shape, templates)
    assert not file.exists()
    assert len(os.listdir("/proc/self/fd")) == opened


@pytest.mark.parametrize("shape", [SMALL, LONGER])
def test_a_file_from_a_template_replaces_what_a_kill_left(shape, tmp_path):
    """Its mode is the one that any new file has."""
    templates, first, second = (
        FileTemplateCache(),
        tmp_path / "a" / "fp32.pt",
        tmp_path / "b" / "fp32.pt",
    )
    for file in (first, second):
        file.parent.mkdir()
    write_from_template(first, shape, templates)
    second.write_bytes(b"\xaa" * 200_000)
    write_from_template(second, shape, templates)
    assert second.read_bytes() == first.read_bytes()
    before = os.umask(0o027)
    try:
        write_from_template(tmp_path / "fp32.pt", shape, templates)
    finally:
        os.umask(before)
    assert (tmp_path / "fp32.pt").stat().st_mode & 0o777 == 0o640
