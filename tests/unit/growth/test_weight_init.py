"""Freshly drawn weights: where they are drawn changes nothing, and they are normal."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lag_megatron.checkpoint.families.roles import megatron_role
from lag_megatron.checkpoint.state.box import Box, full_box, numel
from lag_megatron.growth import weight_init
from lag_megatron.growth.weight_init import Constant, Normal, fill, initial_weights, normal

UNIT = Normal(1.0, "test")


@given(st.integers(0, 50), st.integers(0, 50))
def test_values_do_not_depend_on_the_cut(start, count):
    values = normal(UNIT, 0, 100)
    assert np.array_equal(normal(UNIT, start, count), values[start : start + count])


@given(st.lists(st.integers(1, 6), max_size=3).map(tuple), st.data(), st.sampled_from([3, 1 << 18]))
def test_a_box_holds_the_values_of_the_whole(shape, data, chunk):
    everything = torch.empty(shape)
    fill(everything, UNIT, shape=shape, box=full_box(shape))
    assert np.array_equal(everything.numpy().reshape(-1), normal(UNIT, 0, numel(shape)))
    low = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(data.draw(st.integers(1, n - a)) for a, n in zip(low, shape, strict=True))
    part = torch.empty(extent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_init, "_CHUNK", chunk)
        fill(part, UNIT, shape=shape, box=Box(low, extent))
    slices = tuple(slice(a, a + n) for a, n in zip(low, extent, strict=True))
    assert torch.equal(part, everything[slices])


def test_far_positions_are_cheap_and_stable():
    assert normal(UNIT, 10**12 + 1, 2).tolist() == normal(UNIT, 10**12, 3)[1:].tolist()


def test_a_golden_value_keeps_old_plans_reproducible():
    expected = [0.2286207228899002, -0.6306005716323853, -1.7181886434555054]
    assert normal(Normal(1.0, "golden"), 0, 3).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_the_distribution_is_normal(std):
    values = normal(Normal(std, "distribution"), 0, 200_000).astype(np.float64) / std
    assert abs(values.mean()) < 5 / np.sqrt(len(values))
    assert values.std() == pytest.approx(1.0, abs=0.01)
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(stats.kurtosis(values)) < 0.05
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    assert np.isfinite(values).all()


def test_keys_give_unrelated_values():
    one, other = (normal(Normal(1.0, key), 0, 50_000) for key in ("growth/1/a", "growth/1/b"))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert len(np.intersect1d(one, other)) < 50


def test_narrow_types_are_rounded_from_the_same_values():
    target = torch.empty(64, dtype=torch.bfloat16)
    fill(target, UNIT, shape=(64,), box=full_box((64,)))
    assert torch.equal(target, torch.from_numpy(normal(UNIT, 0, 64)).bfloat16())


LAYER = "decoder.layers.3."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.word_embeddings.weight", 0.02),
        ("embedding.position_embeddings.weight", 0.02),
        ("output_layer.weight", 0.02),
        (LAYER + "self_attention.linear_qkv.weight", 0.02),
        (LAYER + "mlp.linear_fc1.weight", 0.02),
        (LAYER + "self_attention.linear_proj.weight", 0.02 / np.sqrt(16)),
        (LAYER + "mlp.linear_fc2.weight", 0.02 / np.sqrt(16)),
    ],
)
def test_megatrons_scales(name, expected):
    drawn = initial_weights(megatron_role(name), name, (8, 4), num_layers=8, init_std=0.02, key="k")
    assert drawn == Normal(pytest.approx(expected), f"k/{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (LAYER + "input_layernorm.weight", 1.0),
        (LAYER + "pre_mlp_layernorm.weight", 1.0),
        ("decoder.final_layernorm.weight", 1.0),
        (LAYER + "input_layernorm.bias", 0.0),
        (LAYER + "mlp.linear_fc1.bias", 0.0),
        (LAYER + "self_attention.linear_proj.bias", 0.0),
    ],
)
def test_norms_are_the_identity_and_biases_nothing(name, value):
    drawn = initial_weights(megatron_role(name), name, (8,), num_layers=8, init_std=0.02, key="k")
    assert drawn == Constant(value)
    target = torch.empty(3, 2)
    fill(target, drawn, shape=(6, 4), box=Box((1, 1), (3, 2)))
    assert torch.equal(target, torch.full((3, 2), value))
