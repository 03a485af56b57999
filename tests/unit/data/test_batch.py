"""Batches in a form that nothing has to be read from on a device."""

import torch

from lag_megatron.data.batch import normalize_batch


def rows(count=5, length=7):
    place = torch.arange(count * length).view(count, length)
    return {"tokens": place, "labels": place + 1, "loss_mask": torch.ones(count, length)}


def test_rows_with_a_prefix_come_last_in_their_order():
    batch = rows() | {"prefix_length": torch.tensor([0, 3, 0, 2, 0])}
    found = normalize_batch(batch)
    order = [0, 2, 4, 1, 3]
    for name in ("tokens", "labels"):
        assert torch.equal(found[name], batch[name][order])
    assert found["prefix_length"].tolist() == [3, 2]
    assert len(batch["prefix_length"]) == 5  # the given one stays as it is
    again = normalize_batch(found)
    assert again.keys() == found.keys()
    assert all(again[name].data_ptr() == found[name].data_ptr() for name in found)  # pinned stays


def test_without_a_prefix_nothing_is_said_of_any():
    batch = rows() | {"prefix_length": torch.zeros(5, dtype=torch.int64)}
    found = normalize_batch(batch)
    assert found.keys() == batch.keys() - {"prefix_length"}
    assert all(torch.equal(found[name], batch[name]) for name in found)


def test_a_mask_of_padding_is_kept_where_a_row_is_padded():
    whole = torch.ones(5, 7, dtype=torch.bool)
    assert "padding_mask" not in normalize_batch(rows() | {"padding_mask": whole})
    padded = whole.clone()
    padded[2, 6] = False
    assert torch.equal(normalize_batch(rows() | {"padding_mask": padded})["padding_mask"], padded)
