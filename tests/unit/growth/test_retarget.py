"""Another topology for a checkpoint: what is replaced, and what no topology can be."""

import pytest

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.grown_state import retarget

SOURCE = Topology(zero_stage=1, data_size=4, tensor_size=2, precision="bf16")


def test_what_is_not_given_stays():
    assert retarget(SOURCE) == SOURCE
    found = retarget(SOURCE, world_size=2, precision="fp32")
    assert found == Topology(zero_stage=1, data_size=1, tensor_size=2, precision="fp32")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp8"}, r"--precision: expected one of fp32, bf16, fp16 \(got 'fp8'\)"),
        ({"precision": ""}, r"--precision: expected one of fp32, bf16, fp16 \(got ''\)"),
        ({"precision": 16}, r"--precision: expected one of fp32, bf16, fp16 \(got 16\)"),
        ({"zero_stage": 4}, "--zero-stage"),
        ({"world_size": 0}, "--world-size"),
        ({"tensor_size": True}, "--tensor-parallel"),
        ({"world_size": 3}, "3 ranks cannot be split into tensor-parallel groups of 2"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(PlanError, match=message):
        retarget(SOURCE, **given)
