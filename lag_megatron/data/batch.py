"""Batches in the form that a step needs, so that no shape depends on values on a device."""

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def normalize_batch(batch: Batch) -> Batch:
    """The same rows in a fixed form; a batch that has it already is returned as it is.

    ``padding_mask`` is left out where no row is padded.  Rows that begin with a prefix come last;
    ``prefix_length`` has an entry for these alone, and is left out where there are none.  The step
    can then choose its kernels without reading values back from the device.

    Args:
        batch: tensors with one row a sample, on the CPU.
    """
    found = dict(batch)
    if "padding_mask" in found and bool(found["padding_mask"].all()):
        del found["padding_mask"]
    if "prefix_length" not in found:
        return found
    prefix_length = found.pop("prefix_length")
    has_prefix = prefix_length > 0
    count = int(has_prefix.sum())
    if not count:
        return found
    if not bool(has_prefix[-count:].all()):
        order = has_prefix.byte().argsort(stable=True)
        prefix_length = prefix_length[order]
        found = {name: rows[order] for name, rows in found.items()}
    return found | {"prefix_length": prefix_length[-count:]}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The normalized batch on ``device``; from pinned memory the copy is asynchronous."""
    return {name: t.to(device, non_blocking=True) for name, t in normalize_batch(batch).items()}
