"""What DeepSpeed is given: our values, its user's, and defaults that the user's replace."""

import pytest
from configuring import config

from lag_megatron.config.deepspeed import deepspeed_config
from lag_megatron.errors import ConfigError


def given(*overrides):
    return deepspeed_config(config(*overrides), world_size=1)


def test_nothing_waits_for_numbers_that_nobody_asked_for():
    found = given()
    assert found["timers"] == {"throughput": {"enabled": False}}
    assert found["steps_per_print"] > 10**6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("timers", {"throughput": {"enabled": True, "synchronized": False}}),
        ("steps_per_print", 10),
        ("zero_allow_untested_optimizer", False),
        ("communication_data_type", "bf16"),
        ("wall_clock_breakdown", True),
    ],
)
def test_what_the_user_says_is_taken(key, value):
    text = str(value).replace("'", "")
    assert given("parallel.precision=bf16", f"deepspeed={{{key}: {text}}}")[key] == value


def test_auto_is_ours():
    auto = (
        "deepspeed={train_batch_size: auto, zero_optimization: {stage: auto, overlap_comm: true}}"
    )
    found = given(auto, "parallel.zero_stage=2")
    assert found["train_batch_size"] == config().parallel.global_batch
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True}


def test_a_contradiction_is_refused():
    with pytest.raises(ConfigError, match=r"deepspeed.gradient_clipping: 7 contradicts 1.0"):
        given("deepspeed={gradient_clipping: 7}")
