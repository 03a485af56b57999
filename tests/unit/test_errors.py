"""What messages are made of: sizes that show a difference, reasons and advice that fit."""

import errno
import os

import pytest

from lag_megatron.errors import sizes, write_failure


@pytest.mark.parametrize(
    ("counts", "texts"),
    [
        ((5 * 2**30, 2**30), ["5.0 GiB", "1.0 GiB"]),
        ((2**30, 2**30 - 2**20), ["1,024.0 MiB", "1,023.0 MiB"]),
        ((5000, 4096), ["4.9 KiB", "4.0 KiB"]),
        ((4097, 4096), ["4,097 bytes", "4,096 bytes"]),
        ((300, 0), ["300 bytes", "0 bytes"]),
        ((7, 7), ["7 bytes", "7 bytes"]),
    ],
)
def test_sizes_are_in_the_largest_unit_that_shows_their_difference(counts, texts):
    assert sizes(*counts) == texts


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EROFS, "Make the place writable"),
        (errno.EACCES, "Make the place writable"),
        (errno.ENOENT, "Its folder was removed meanwhile"),
        (errno.EIO, "Mend that"),
    ],
)
def test_the_advice_fits_why_a_file_cannot_be_written(number, advice):
    reason, found = write_failure(OSError(number, os.strerror(number), "file"))
    assert reason == f"{os.strerror(number)}."
    assert found.startswith(advice)


def test_torch_says_little_of_a_full_disk():
    reason, advice = write_failure(RuntimeError("unexpected pos 64 vs 0\nmore"))
    assert reason == "the disk is full or failed (unexpected pos 64 vs 0)."
    assert advice.startswith("See that there is room")
