"""What a step would have to ask a device about its batch, said before the batch is there."""

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def normalize_batch(batch: Batch) -> Batch:
    """The same rows, so that no shape depends on values that lie on a device.

    ``padding_mask`` is left out where no row is padded.  Rows that begin with a prefix come last;
    ``prefix_length`` is theirs alone, and left out where there is none.  What is ready stays so.
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
    """A batch where it is computed with; from pinned memory nothing waits for it."""
    return {name: t.to(device, non_blocking=True) for name, t in normalize_batch(batch).items()}
