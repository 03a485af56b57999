"""Advice to the kernel's page cache: what to read ahead, and when to write back.

By default the kernel reads around each page that is touched, megabytes on disks set up for long
reads.  Ranks that need neighbouring parts of a shard would then each read the other's part too.
"""

import ctypes
import mmap

from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2


def disable_readahead(tensor: Tensor) -> Tensor:
    """Turn readahead off for the pages of a mapped tensor, and return the tensor."""
    _advise(tensor.data_ptr(), tensor.numel() * tensor.element_size(), mmap.MADV_RANDOM)
    return tensor


def read_ahead(tensor: Tensor, offset: int, count: int) -> None:
    """Begin to read elements ``offset .. offset + count`` of a flat mapped tensor."""
    width = tensor.element_size()
    _advise(tensor.data_ptr() + offset * width, count * width, mmap.MADV_WILLNEED)


def start_writeback(file: int, offset: int, length: int) -> None:
    """Start to write bytes of an open file to the disk, so that a later ``fsync`` is short."""
    _libc.sync_file_range(file, offset, length, _SYNC_FILE_RANGE_WRITE)


def _advise(address: int, length: int, advice: int) -> None:
    """Call ``madvise``; errors are ignored, since without the advice reading is only slower."""
    begin = address - address % mmap.PAGESIZE
    if length:
        _libc.madvise(begin, address + length - begin, advice)
