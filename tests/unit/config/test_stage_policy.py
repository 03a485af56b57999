"""Stages written as a policy, and their lengths."""

from pathlib import Path
from typing import Any

import pytest

from lag_megatron.config import load_config, parse_config
from lag_megatron.config.schema.shares import shares
from lag_megatron.errors import ConfigError, PlanError
from lag_megatron.growth.pool import growth_pools

ROOT = Path(__file__).parents[3]
MODEL = {
    "num_layers": 4,
    "hidden_size": 8,
    "ffn_hidden_size": 8,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "seq_length": 16,
}
PARALLEL = {"micro_batch": 2, "global_batch": 4}


def config_of(stages: Any, **rest: Any) -> Any:
    layers = stages["layers"][0] if isinstance(stages, dict) else 4
    tree = {"model": {**MODEL, "num_layers": layers}, "parallel": PARALLEL, "stages": stages}
    return parse_config({**tree, "growth": {"lag": 2}, **rest})


def layers_and_steps(config: Any) -> list[tuple[int, int]]:
    return [(config.layers_of(n), stage.steps) for n, stage in enumerate(config.stages)]


@pytest.mark.parametrize(
    ("policy", "layers", "drawn"),
    [
        ("last", [4, 6], "1 2 3 4 3* 4*"),
        ("midas", [4, 6], "1 2 1* 2* 3 4"),
        ("random_top", [4, 6], "1 2 3 4 R R"),
        ("progressive", [4, 8], "1 2 3 4 1* 2* 3* 4*"),
        ("g_stack", [4, 12], "1 2 3 4 1* 2* 3* 4* 1* 2* 3* 4*"),
    ],
)
def test_fixed_policies_are_pools_of_one(policy: str, layers: list[int], drawn: str) -> None:
    from lag_megatron.growth.operators.layer_map import format_layer_map

    config = config_of({"policy": policy, "layers": layers, "steps": 21})
    assert layers_and_steps(config) == [(layers[0], 10), (layers[1], 11)]
    (candidate,) = growth_pools(config)[1]
    assert format_layer_map(candidate.plan.layer_map) == drawn


def test_adaptive_is_the_papers_pools() -> None:
    """Karp et al. 2024, appendix A.3: 3 + 15 + 27 + 21 + 27 candidates, blocks 1, 2 and 4."""
    short = config_of({"policy": "adaptive", "layers": [4, 8, 12, 16, 20, 24], "steps": 60})
    pools = growth_pools(short)
    assert [len(pool) for pool in pools.values()] == [3, 15, 27, 21, 27]
    published = load_config(ROOT / "configs" / "bert_large_stacking.yaml")
    same = config_of(
        {
            "policy": "adaptive",
            "layers": [4, 8, 12, 16, 20, 24],
            "steps": [160_000] * 5 + [200_000],
        }
    )
    assert layers_and_steps(same) == layers_and_steps(published)
    for number, pool in growth_pools(published).items():
        assert [c.id for c in pool] == [c.id for c in pools[number]]


def test_scratch_has_one_stage() -> None:
    config = config_of({"policy": "scratch", "layers": [12], "steps": 50})
    assert layers_and_steps(config) == [(12, 50)]
    assert growth_pools(config) == {}


def test_the_global_growth_says_the_rest() -> None:
    config = config_of(
        {"policy": "adaptive", "layers": [4, 8], "steps": 9},
        growth={"lag": 3, "pool": {"block_size": [2], "scale": [1.0, 0.5]}},
    )
    assert config.growth_before(1).lag == 3
    assert [c.id for c in growth_pools(config)[1]] == ["i0-b2-duplicate", "i0-b2-duplicate-s0.5"]


def test_steps_are_split_and_add_up() -> None:
    for alpha in (0.0, 0.5, 1.0, 2.0):
        for total in (7, 100, 1_000_001):
            parts = shares(total, 6, alpha=alpha)
            assert sum(parts) == total
            weights = [n**alpha for n in range(1, 7)]
            exact = [total * w / sum(weights) for w in weights]
            assert max(abs(p - e) for p, e in zip(parts, exact, strict=True)) <= 1
    # Saunshi et al. 2024: the mean depth of PROP-1 over 6 stages is 0.722 of the last one's.
    parts = shares(10**6, 6, alpha=1.0)
    assert sum(p * n / 6 for n, p in enumerate(parts, 1)) / 1e6 == pytest.approx(0.722, abs=5e-4)


def test_proportional_split_and_tokens() -> None:
    config = config_of(
        {
            "policy": "last",
            "layers": [4, 6, 8],
            "tokens": 6 * 64 * 10,
            "split": "proportional",
            "alpha": 1.0,
        }
    )
    assert layers_and_steps(config) == [(4, 10), (6, 20), (8, 30)]


def test_tokens_become_steps_rounded_up() -> None:
    config = config_of([{"tokens": 640}, {"tokens": 641, "num_layers": 6}])
    assert layers_and_steps(config) == [(4, 10), (6, 11)]
    assert all(stage.tokens is None for stage in config.stages)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            {"policy": "best", "layers": [4], "steps": 9},
            "stages.policy: must be 'adaptive', 'last'",
        ),
        ({"policy": "last", "layers": [4, 4], "steps": 9}, "strictly rising (got [4, 4])"),
        ({"policy": "last", "layers": [4, 8]}, "give either steps or tokens"),
        ({"policy": "last", "layers": [4, 8], "steps": [9]}, "1 numbers for 2 stages"),
        ({"policy": "last", "layers": [4, 8], "steps": 1}, "1 cannot be split among 2 stages"),
        ({"policy": "scratch", "layers": [4, 8], "steps": 9}, "'scratch' has 1 of them"),
        ({"policy": "g_stack", "layers": [4], "steps": 9}, "'g_stack' has 2 of them"),
        ({"policy": "last", "layers": [4, 8], "steps": 9, "alpha": -1.0}, "stages.alpha"),
        ({"policy": "last", "layers": [4, 8], "step": 9}, "stages.step: unknown key (got 9)"),
        ([{"steps": 4, "tokens": 64}], "stages.0: give either steps or tokens"),
        ([{"tokens": -1}], "stages.0.tokens: must be above 0 (got -1)"),
        ([{"steps": 4, "rewind": 1.5}], "stages.0.rewind: there is no stage before the first"),
        (
            [{"steps": 4}, {"steps": 4, "num_layers": 6, "rewind": 0.5}],
            "stages.1.rewind: must be 1 or more (got 0.5)",
        ),
        ([{"steps": 4, "until_slope": 0.1}], "stages.0.until_slope: must lie between -1 and 0"),
    ],
)
def test_mistakes_are_named(stages: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(stages)
    assert expected in str(error.value)


def test_a_short_form_does_not_hide_other_mistakes() -> None:
    with pytest.raises(ConfigError) as error:
        config_of({"policy": "last", "layers": [], "steps": 9} | {"layers": [4, 2]}, seed="x")
    assert "2 problems" in str(error.value)


def test_an_impossible_growth_is_refused() -> None:
    with pytest.raises(PlanError, match="doubles"):
        growth_pools(config_of({"policy": "progressive", "layers": [4, 6], "steps": 9}))


def test_an_exhaustive_search_needs_a_known_end() -> None:
    stages = [{"steps": 9}, {"steps": 9, "num_layers": 6, "until_slope": -0.05}]
    with pytest.raises(ConfigError, match="exhaustive trains candidates"):
        config_of(stages, growth={"lag": 2, "exhaustive": True})


def test_a_decay_to_an_unknown_end_is_refused() -> None:
    stages = [{"steps": 9, "until_slope": -0.05}]
    with pytest.raises(ConfigError, match=r"needs optimizer\.schedule\.decay_steps"):
        config_of(stages, optimizer={"schedule": {"name": "linear"}})
    config_of(stages, optimizer={"schedule": {"name": "linear", "decay_steps": 20}})
