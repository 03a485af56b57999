"""Paths of Random Path Training: how they are drawn, what they cost, what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lag_megatron.config import RunConfig, load_config, parse_config
from lag_megatron.errors import ConfigError
from lag_megatron.growth.pool import build_pool
from lag_megatron.planning.cost import (
    stage_flops,
    steps_flops,
    training_flops_per_token,
)
from lag_megatron.planning.random_paths import (
    LayerPath,
    layers_run,
    mean_layers_run,
    path_at,
    with_path_length,
)
from lag_megatron.run.resolved_config import as_journalled
from lag_megatron.training.dry_run import describe_run

ROOT = Path(__file__).parents[3]
STEPS = 4000


def run_of(stages: object, **more: object) -> RunConfig:
    tree = {
        "model": {
            "num_layers": 12,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 4,
            "seq_length": 16,
            "vocab_size": 128,
        },
        "stages": stages,
        **more,
    }
    return parse_config(tree)


def drawn(config: RunConfig, steps: int = STEPS) -> list[LayerPath]:
    found = [path_at(step, config) for step in range(steps)]
    assert all(path is not None for path in found)
    return found  # type: ignore[return-value]


def test_paths_of_a_length_have_it_and_the_fixed_layers() -> None:
    for path in drawn(run_of([{"steps": STEPS, "path_length": 6}])):
        assert len(path.layers) == 6
        assert path.layers == tuple(sorted(set(path.layers)))
        assert {0, 11} <= set(path.layers)
        assert path.skipped == set(range(12)) - set(path.layers)


def test_every_choice_of_the_free_layers_is_equally_likely() -> None:
    config = run_of([{"steps": STEPS, "path_length": 4}], raptr={"fixed": [0, 5, -1]})
    free = [layer for layer in range(12) if layer not in (0, 5, 11)]
    (one,) = zip(*((set(p.layers) - {0, 5, 11}) for p in drawn(config)), strict=True)
    counts = [one.count(layer) for layer in free]
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = run_of([{"steps": STEPS, "path_length": 4}])
    chosen = [tuple(sorted(set(p.layers) - {0, 11})) for p in drawn(pairs)]
    counts = [chosen.count(pair) for pair in itertools.combinations(range(1, 11), 2)]
    assert sum(counts) == STEPS
    assert stats.chisquare(counts).pvalue > 1e-3


def test_one_step_tells_nothing_of_the_next() -> None:
    paths = drawn(run_of([{"steps": STEPS, "path_length": 6}]))
    runs = np.array([[layer in p.layers for layer in range(1, 11)] for p in paths])
    now, then = runs[:-1].ravel(), runs[1:].ravel()
    table = [[(now & then).sum(), (now & ~then).sum()], [(~now & then).sum(), (~now & ~then).sum()]]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_kept_layers_are_independent_with_their_probability() -> None:
    config = run_of([{"steps": STEPS, "keep_probability": 0.4}])
    runs = np.ones((STEPS, 12), dtype=bool)
    for step in range(STEPS):
        path = path_at(step, config)
        if path is not None:
            runs[step] = [layer in path.layers for layer in range(12)]
    assert runs[:, [0, 11]].all()
    free = runs[:, 1:11]
    assert stats.binomtest(int(free.sum()), free.size, 0.4).pvalue > 1e-3
    lengths = free.sum(axis=1)
    expected = stats.binom.pmf(range(11), 10, 0.4) * STEPS
    counts = np.bincount(lengths, minlength=11)
    few = expected < 5
    assert (
        stats.chisquare(
            [*counts[~few], counts[few].sum()], [*expected[~few], expected[few].sum()]
        ).pvalue
        > 1e-3
    )
    assert mean_layers_run(config, range(STEPS)) == pytest.approx(2 + lengths.mean())


def test_a_path_follows_from_seed_and_step_alone() -> None:
    config = run_of([{"steps": 50, "path_length": 5}])
    assert drawn(config, 50) == drawn(config, 50)
    other = dataclasses.replace(config, seed=config.seed + 1)
    assert drawn(other, 50) != drawn(config, 50)
    # A stage that begins elsewhere, or is longer, draws the same for a step.
    later = run_of([{"steps": 20}, {"steps": 500, "path_length": 5}])
    assert [path_at(step, later) for step in range(20, 50)] == drawn(config, 50)[20:]


def test_the_draws_are_the_same_for_all_time() -> None:
    """Another release that drew other paths would not go on with a run as it was."""
    config = run_of([{"steps": 10, "path_length": 5}], seed=7)
    assert [path.layers for path in drawn(config, 4)] == GOLDEN


GOLDEN = [(0, 1, 9, 10, 11), (0, 4, 5, 10, 11), (0, 3, 7, 10, 11), (0, 1, 2, 3, 11)]


@pytest.mark.parametrize(("scale", "factor"), [("none", 1.0), ("sqrt", 2**0.5), ("linear", 2.0)])
def test_scales(scale: str, factor: float) -> None:
    config = run_of([{"steps": 5, "path_length": 6}], raptr={"scale": scale})
    assert drawn(config, 5)[0].branch_scale == pytest.approx(factor)
    whole = run_of([{"steps": 5, "path_length": 12}], raptr={"scale": scale})
    assert path_at(0, whole) is None


def test_several_lengths_are_for_equal_parts() -> None:
    config = run_of([{"steps": 2}, {"steps": 10, "path_length": [3, 6, 12]}])
    lengths = [12 if path is None else len(path.layers)
               for path in (path_at(step, config) for step in range(12))]  # fmt: skip
    assert lengths == [12, 12, 3, 3, 3, 6, 6, 6, 6, 12, 12, 12]
    assert layers_run(config, range(12)) == {12: 5, 3: 3, 6: 4}


@pytest.mark.parametrize("rule", [{"path_length": [2, 5]}, {"keep_probability": [0.2, 0.9]}, {}])
def test_flops_are_those_of_the_layers_that_run(rule: dict[str, object]) -> None:
    config = run_of([{"steps": 30, **rule}, {"steps": 3}])
    by_hand = 0
    for step in range(33):
        path = path_at(step, config)
        layers = 12 if path is None else len(path.layers)
        by_hand += 32 * 16 * training_flops_per_token(config, num_layers=layers, vocab_size=128)
    assert steps_flops(config, range(33), vocab_size=128) == by_hand
    parts = sum(stage_flops(config, stage, vocab_size=128) for stage in (0, 1))
    assert parts == by_hand
    assert steps_flops(config, range(5, 5), vocab_size=128) == 0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"steps": 5, "path_length": 1}], r"path_length: must lie between 2, .* 12 \(got \[1\]\)"),
        ([{"steps": 5, "path_length": [4, 13]}], r"must lie between 2.*got \[4, 13\]"),
        ([{"steps": 5, "path_length": []}], "one value, or several"),
        ([{"steps": 1, "path_length": [4, 6]}], "parts of the stage's 1 steps"),
        ([{"steps": 5, "keep_probability": 0.0}], "above 0 and at most 1"),
        ([{"steps": 5, "keep_probability": 1.5}], "above 0 and at most 1"),
        ([{"steps": 5, "keep_probability": 0.5, "path_length": 4}], "give either"),
        ([{"steps": 5, "path_length": [4, 6], "until_slope": -0.05}], "which until_slope leaves"),
        (
            [{"steps": 9}, {"steps": 9, "growth": {"lag": 3, "pool": {"operator": "identity"}}}],
            "candidates differ in their paths",
        ),
        (
            [{"steps": 9}, {"steps": 9, "num_layers": 14, "growth": {"lag": 3, "pool": {
                "operator": "identity", "path_length": [4]}}}],
            "'identity' adds no layers",
        ),
        (
            [{"steps": 9}, {"steps": 9, "path_length": 4, "growth": {"lag": 3, "pool": {
                "operator": "identity", "path_length": [4, 6]}}}],
            "Remove its own path_length",
        ),
        (
            [{"steps": 9}, {"steps": 9, "growth": {"lag": 3, "pool": {
                "operator": "identity", "path_length": [4, [4, 20]]}}}],
            r"growth.pool.path_length: must lie between 2.*got \[4, 20\]",
        ),
        (
            [{"steps": 9}, {"steps": 9, "growth": {"lag": 3, "pool": {
                "operator": "identity", "path_length": [4, [4], 6]}}}],
            r"4 and \[4\] are the same for the 3 steps before the decision",
        ),
        (
            [{"steps": 9}, {"steps": 9, "growth": {"lag": 3, "pool": {
                "operator": "identity", "path_length": [4, [4, 8, 12]]}}}],
            r"4 and \[4, 8, 12\] are the same for the 3 steps",
        ),
        (
            [{"steps": 9}, {"steps": 9, "growth": {"lag": 3, "pool": {
                "operator": "identity", "path_length": 4}}}],
            r"path_length: must be a list of whole numbers or lists of whole numbers \(got 4\)",
        ),
        (
            [{"steps": 9}, {"steps": 9, "growth": {"lag": 3, "pool": {"path_length": [4, 6]}}}],
            r"stages.1.growth.pool.path_length: no stage of this run tries these paths",
        ),
        ([{"steps": 5, "path_length": 2}, {"steps": 5, "num_layers": 0, "path_length": 2}], "grow"),
    ],
)  # fmt: skip
def test_what_is_refused(stages: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(stages)


def test_fixed_layers_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"raptr.fixed: \[12\] are no layers of stage 0"):
        run_of([{"steps": 5, "path_length": 4}], raptr={"fixed": [0, 12]})
    with pytest.raises(ConfigError, match=r"without a layer in raptr\.fixed"):
        run_of([{"steps": 5, "keep_probability": 0.5}], raptr={"fixed": []})
    assert path_at(0, run_of([{"steps": 5, "path_length": 1}], raptr={"fixed": []})) is not None
    with pytest.raises(ConfigError, match=r"raptr\.scales.*scale"):
        run_of([{"steps": 5}], raptr={"scales": "sqrt"})


def policy(**given: object) -> RunConfig:
    return run_of({"policy": "raptr", "layers": [12], **given})


def test_the_papers_schedule_as_a_policy() -> None:
    config = policy(paths=[6, 8, 10, 12], steps=400)
    stages = [(s.steps, s.path_length, s.num_layers) for s in config.stages]
    assert stages == [(100, 6, 12), (100, 8, 12), (100, 10, 12), (100, None, 12)]
    assert mean_layers_run(config, range(400)) == 9  # 1.33 times fewer, as in the paper
    assert policy(flops_share=0.75, steps=400) == config
    assert policy(flops_share=1.0, steps=400).stages == policy(paths=[12] * 4, steps=400).stages


def test_a_warm_up_of_the_whole_model_counts() -> None:
    config = policy(paths=[6, 12], steps=100, full_warmup=40)
    assert [(s.steps, s.path_length) for s in config.stages] == [(40, None), (30, 6), (30, None)]
    shared = policy(flops_share=0.75, steps=400, full_warmup=100)
    assert shared.stages[0].steps == 100
    assert mean_layers_run(shared, range(400)) <= 9
    assert policy(paths=[6, 12], steps=[3, 5]).total_steps == 8
    assert policy(paths=[6, 12], tokens=51200).total_steps == 100


@pytest.mark.parametrize("share", [0.6, 0.7, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_a_share_is_kept_and_used(share: float, stages: int) -> None:
    config = policy(flops_share=share, path_stages=stages, steps=600)
    lengths = [s.path_length or 12 for s in config.stages]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 12
    spent = mean_layers_run(config, range(600)) / 12
    assert share - 1 / 12 < spent <= share


def test_a_layer_that_is_fixed_twice_counts_once() -> None:
    twice = {"policy": "raptr", "layers": [12], "flops_share": 0.6, "steps": 600}
    config = run_of(twice, raptr={"fixed": [0, 0, 11, -1]})
    assert [s.path_length for s in config.stages] == [
        s.path_length for s in policy(flops_share=0.6, steps=600).stages
    ]


def test_a_pool_that_decides_paths_costs_at_most_its_longest() -> None:
    growth = {"lag": 3, "pool": {"operator": "identity", "path_length": [4, [8, 6]]}}
    config = run_of([{"steps": 10}, {"steps": 10, "growth": growth}])
    text = describe_run(config, world_size=1)
    row = text[text.index("== stages ==") :].splitlines()[4]
    assert row.split()[1:3] == ["12", "<=7"]
    longest = with_path_length(config, 1, (8, 6))
    assert row.split()[-1] == f"{stage_flops(longest, 1, vocab_size=128):.3e}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 100}, "needs either paths or flops_share"),
        ({"steps": 100, "paths": [6], "flops_share": 0.5}, "needs either paths or flops_share"),
        ({"steps": 100, "flops_share": 0.55}, "less than paths that rise to 12 layers"),
        ({"steps": 100, "flops_share": 1.5}, "above 0 and at most 1"),
        (
            {"steps": 100, "flops_share": 0.8, "path_stages": 0},
            "path_stages: must lie between 1 and 100",
        ),
        ({"steps": 100, "paths": [6], "full_warmup": -1}, "must not be negative"),
        ({"steps": [50, 50], "paths": [6, 12], "full_warmup": 9}, "give the steps of all"),
        ({"steps": 10, "paths": [6, 12], "full_warmup": 9}, "after a full_warmup of 9"),
        ({"steps": 100, "paths": [6], "layers": [6, 12]}, "has 1 of them"),
        ({"steps": 100, "policy": "scratch", "paths": [6]}, "is for the policy 'raptr'"),
        ({"steps": 100, "policy": "scratch", "path_stages": 2}, "path_stages: is for the policy"),
        ({"steps": 100, "paths": [6, 12], "path_stages": 2}, "for flops_share alone"),
        ({"steps": [-10, 20], "flops_share": 0.8, "path_stages": 2}, "each must be above 0"),
    ],
)
def test_what_a_policy_refuses(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(**given)


def test_candidates_have_their_paths() -> None:
    config = load_config(
        ROOT / "configs" / "demo.yaml",
        overrides=["growth.pool.path_length=[3, [4, 6]]", "growth.pool.index=[0]"],
    )
    pool = build_pool(
        config.growth_before(1), source_layers=4, target_layers=6, seed=1, init_std=0.02
    )
    assert len({c.id for c in pool}) == len(pool)
    assert {c.id.rpartition("-")[2] for c in pool} == {"p3", "p4.6"}
    assert all(json.loads(json.dumps(c.describe()))["path_length"] in (3, [4, 6]) for c in pool)


def test_a_decision_says_the_paths_of_its_stage() -> None:
    config = run_of([{"steps": 5}, {"steps": 6}])
    journal = [{"event": "run_started"}, {"event": "decision", "growth": 1, "chosen": "x"}]
    assert as_journalled(config, journal) == config
    journal.append({"event": "decision", "growth": 1, "chosen": "y", "path_length": [4, 12]})
    assert as_journalled(config, journal) == with_path_length(config, 1, (4, 12))


def test_the_dry_run_says_how_many_layers_run_and_what_that_saves() -> None:
    text = describe_run(policy(paths=[6, 8, 10, 12], steps=400), world_size=1)
    rows = text[text.index("== stages ==") :].splitlines()[3:7]
    assert [row.split()[1:3] for row in rows] == [["12", n] for n in ("6", "8", "10", "12")]
    config = policy(paths=[6, 8, 10, 12], steps=400)
    whole = policy(paths=[12], steps=400)
    saved = 1 - steps_flops(config, range(400), vocab_size=128) / steps_flops(
        whole, range(400), vocab_size=128
    )
    assert f"{saved:.1%} less." in text
    assert "== whole schedule ==" not in describe_run(whole, world_size=1)


def test_graphs_hold_a_scale() -> None:
    graphs = {"cuda_graphs": True}
    with pytest.raises(ConfigError, match=r"cannot be replayed with raptr\.scale sqrt"):
        run_of([{"steps": 5, "path_length": 6}], parallel=graphs)
    assert run_of([{"steps": 5}], parallel=graphs)
    assert run_of([{"steps": 5, "path_length": 6}], parallel=graphs, raptr={"scale": "none"})
