"""The time limit that ends a process from a thread of its own."""

import multiprocessing
import time

import pytest

from lag_megatron.distributed.watchdog import watched

SECONDS = 0.5


def work(stacks, progress, marker):
    def expired():
        marker.write_text("expired")
        return "nothing happened for too long"

    with watched(SECONDS, stacks=stacks, on_expiry=expired) as progressed:
        for _ in range(progress):
            time.sleep(SECONDS / 4)
            progressed()
        if progress < 8:
            time.sleep(60)


def end_of(stacks, progress, marker):
    process = multiprocessing.get_context("fork").Process(
        target=work, args=(stacks, progress, marker), daemon=True
    )
    process.start()
    process.join(30)
    return process.exitcode


def test_a_hang_ends_with_stacks_and_a_message(tmp_path, capfd):
    stacks = tmp_path / "stacks" / "rank0.txt"
    assert end_of(stacks, 1, tmp_path / "marker") == 1
    assert "in work" in stacks.read_text()
    assert (tmp_path / "marker").read_text() == "expired"
    stderr = capfd.readouterr().err
    assert "nothing happened for too long" in stderr
    assert "in work" in stderr


def test_progress_puts_the_end_off(tmp_path):
    assert end_of(tmp_path / "stacks" / "rank0.txt", 8, tmp_path / "marker") == 0
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("where", ["stacks", "marker"])
def test_it_ends_even_where_nothing_can_be_written(where, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    stacks = blocked / "stacks" if where == "stacks" else tmp_path / "stacks"
    marker = blocked / "marker" if where == "marker" else tmp_path / "marker"
    assert end_of(stacks, 1, marker) == 1


def test_without_a_limit_nobody_watches(tmp_path):
    with watched(None, stacks=tmp_path / "stacks", on_expiry=str) as progressed:
        progressed()
    assert not (tmp_path / "stacks").exists()
