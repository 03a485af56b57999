"""The configuration: what is accepted, and what is said of what is not."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.config import (
    GrowthConfig,
    ParallelConfig,
    data_parallel_size,
    dump_config,
    load_config,
    parse_config,
)
from lag_megatron.config.load import apply_override, merge
from lag_megatron.errors import ConfigError, LagError
from lag_megatron.growth.pool import build_pool

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))

BASE = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 16,
    },
    "stages": [{"steps": 100}, {"steps": 300, "num_layers": 6}],
}


def tree(*overrides):
    result = copy.deepcopy(BASE)
    for override in overrides:
        apply_override(result, override)
    return result


def config(*overrides):
    return parse_config(tree(*overrides))


def problems(*overrides):
    """The lines of the error that these overrides cause, without the heading."""
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    heading, *lines = str(caught.value).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert heading == f"{count} in configuration"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def write(path, values):
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_base_is_accepted_and_frozen():
    run = config()
    assert run.total_steps == 400
    assert [run.layers_of(stage) for stage in (0, 1)] == [4, 6]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.num_layers = 3


def test_a_stage_keeps_the_layers_of_the_one_before():
    run = config("stages=[{steps: 1}, {steps: 300, num_layers: 6}, {steps: 2}, {steps: 3}]")
    assert [run.layers_of(stage) for stage in range(4)] == [4, 6, 6, 6]


def test_config_errors_are_lag_errors():
    assert issubclass(ConfigError, LagError)
    assert issubclass(LagError, ValueError)


# Unknown keys, missing keys, wrong values


@pytest.mark.parametrize(
    ("override", "path", "near"),
    [
        ("modle=3", "modle", "model"),
        ("model.num_layer=3", "model.num_layer", "num_layers"),
        ("model.num-layers=3", "model.num-layers", "num_layers"),
        ("data.tokenizer.vocabsize=3", "data.tokenizer.vocabsize", "vocab_size"),
        ("optimizer.schedule.warmup=3", "optimizer.schedule.warmup", "warmup_steps"),
        ("parallel.zero=3", "parallel.zero", "zero_stage"),
        ("growth.rung=3", "growth.rung", "rungs"),
        ("growth.pool.indices=3", "growth.pool.indices", "index"),
        ("stages[0].step=3", "stages.0.step", "steps"),
        ("stages[1].growth.lagg=3", "stages.1.growth.lagg", "lag"),
        ("tracking.wandb.projects=x", "tracking.wandb.projects", "project"),
    ],
)
def test_unknown_key_with_nearest(override, path, near):
    (line,) = problems(override)
    assert line.startswith(f"{path}: unknown key (got ")
    assert f"Did you mean {near!r}? Known keys: " in line


def test_unknown_key_that_resembles_nothing():
    (line,) = problems("model.zzz=1")
    assert "Did you mean" not in line
    assert "Known keys: family, num_layers, hidden_size" in line


def test_every_mistake_at_once():
    lines = problems(
        "model.num_layer=3",
        "model.hidden_size=wide",
        "parallel.precision=fp16",
        "growth.pool.index=foo",
        "stages[1].steps=many",
        "checkpoint=3",
    )
    paths = {line.partition(":")[0] for line in lines}
    assert paths == {
        "model.num_layer",
        "model.hidden_size",
        "parallel.precision",
        "growth.pool.index",
        "stages.1.steps",
        "checkpoint",
    }


def test_every_contradiction_at_once():
    assert (
        len(problems("optimizer.lr=0", "model.dropout=1", "growth.lag=301", "data.paths=[x]")) == 4
    )


def test_missing_keys():
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"num_layers": 3}})
    text = str(caught.value)
    assert "  stages: required, but not given." in text
    assert "  model.hidden_size: required, but not given." in text
    assert "num_layers" not in text


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.num_layers=x", "model.num_layers: must be a whole number (got 'x')."),
        ("model.num_layers=2.5", "model.num_layers: must be a whole number (got 2.5)."),
        ("model.bias=3", "model.bias: must be true or false (got 3)."),
        ("model.vocab_size=x", "model.vocab_size: must be a whole number or 'auto' (got 'x')."),
        ("model=3", "model: must be a mapping (got 3)."),
        ("model=", "model: must be a mapping (got None)."),
        ("stages=3", "stages: must be a list of mappings (got 3)."),
        ("data.paths=a.txt", "data.paths: must be a list of strings (got 'a.txt')."),
        ("data.text_key=3", "data.text_key: must be a string (got 3)."),
        ("optimizer.lr=fast", "optimizer.lr: must be a number (got 'fast')."),
        (
            "optimizer.betas=[1, 2, 3]",
            "optimizer.betas: must be a list of 2 numbers (got [1, 2, 3]).",
        ),
        ("optimizer.betas=[0.9, x]", "optimizer.betas.1: must be a number (got 'x')."),
        ("parallel.zero_stage=4", "parallel.zero_stage: must be 0, 1, 2 or 3 (got 4)."),
        ("parallel.world_size=x", "parallel.world_size: must be a whole number or null (got 'x')."),
        ("stages[1].growth=3", "stages.1.growth: must be a mapping or null (got 3)."),
        ("growth.rungs=5", "growth.rungs: must be a list of whole numbers (got 5)."),
        (
            "growth.pool.init=[zero]",
            "growth.pool.init.0: must be 'duplicate' or 'random' (got 'zero').",
        ),
        (
            "growth.pool.init=random",
            "growth.pool.init: must be a list of 'duplicate' or 'random' (got 'random').",
        ),
        ("growth.pool.scale=1", "growth.pool.scale: must be a list of numbers (got 1)."),
        ("growth.pool.options=x", "growth.pool.options: must be a mapping (got 'x')."),
        (
            "growth.pool.index=foo",
            "growth.pool.index: must be 'all' or 'even', a whole number or a list of whole numbers "
            "(got 'foo').",
        ),
        (
            "growth.pool.index=[0, foo]",
            "growth.pool.index: must be 'all' or 'even', a whole number or a list of whole numbers "
            "(got [0, 'foo']).",
        ),
    ],
)
def test_wrong_values_are_one_line_each(override, line):
    assert problems(override) == [line]


def test_a_mistake_in_the_global_growth_is_told_once():
    assert len(problems("growth.pool.index=foo", "stages[1].growth={lag: 3}")) == 1
    assert len(problems("growth.lagg=3", "stages[1].growth={lag: 3}")) == 1


def test_a_deeper_mistake_of_a_stage_is_told_besides():
    assert len(problems("growth.lag=x", "stages[1].growth={lag: y}")) == 2


# Files and `extends`


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path):
    write(tmp_path / "base.yaml", {**BASE, "growth": {"lag": 10, "rungs": [5, 10]}})
    (tmp_path / "more").mkdir()
    middle = {"extends": "../base.yaml", "growth": {"rungs": [10]}, "seed": 7}
    write(tmp_path / "more" / "middle.yaml", middle)
    top = write(tmp_path / "top.yaml", {"extends": "more/middle.yaml", "stages": [{"steps": 9}]})
    run = load_config(top)
    assert (run.growth.lag, run.growth.rungs) == (10, (10,))
    assert (run.seed, run.total_steps, run.model.hidden_size) == (7, 9, 32)


def test_extends_in_a_circle(tmp_path):
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(ConfigError, match=r"extends itself \(a\.yaml -> b\.yaml -> a\.yaml\)"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "real.yaml", BASE)
    with pytest.raises(ConfigError, match=r"rael\.yaml: no such .*Files there: real\.yaml"):
        load_config(tmp_path / "rael.yaml")
    with pytest.raises(ConfigError, match=r"no such configuration file\.$"):
        load_config(tmp_path / "nowhere" / "a.yaml")


def test_a_missing_base(tmp_path):
    path = write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    with pytest.raises(ConfigError, match=r"b\.yaml: no such .*Files there: a\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("", "expected a mapping at the top, got NoneType"),
        ("- 1", "expected a mapping at the top, got list"),
        ("seed: 1\nmodel: {}\nseed: 2\n", "the key 'seed' is given twice"),
        ("model: {bias: true, bias: false}", "the key 'bias' is given twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_not_a_text_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path)


def test_an_error_names_its_file(tmp_path):
    path = write(tmp_path / "a.yaml", tree("model.bias=3"))
    with pytest.raises(ConfigError, match=re.escape(f"1 problem in {path}")):
        load_config(path)


# --set


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("optimizer.lr=3e-4", lambda c: c.optimizer.lr, 3e-4),
        ("optimizer.lr=0.01", lambda c: c.optimizer.lr, 0.01),
        ("stages.0.steps=7", lambda c: c.stages[0].steps, 7),
        ("stages[1].steps=700", lambda c: c.stages[1].steps, 700),
        ("stages=[{steps: 3}]", lambda c: c.total_steps, 3),
        ("data={source: text, paths: [a b.txt]}", lambda c: c.data.paths, ("a b.txt",)),
        ("growth.pool.index=[0, 1]", lambda c: c.growth.pool.index, (0, 1)),
        ("growth.pool.index=1", lambda c: c.growth.pool.index, 1),
        ("growth.pool.index=all", lambda c: c.growth.pool.index, "all"),
        ("tracking.wandb.project=a=b", lambda c: c.tracking.wandb.project, "a=b"),
        ("optimizer.schedule.decay_steps=null", lambda c: c.optimizer.schedule.decay_steps, None),
        ("stages[1].growth.lag=9", lambda c: c.stages[1].growth.lag, 9),
        (
            "deepspeed.comms_logger.enabled=true",
            lambda c: c.deepspeed,
            {"comms_logger": {"enabled": True}},
        ),
    ],
)
def test_set(tmp_path, override, get, value):
    path = write(tmp_path / "a.yaml", BASE)
    assert get(load_config(path, overrides=[override])) == value


def test_the_last_set_wins(tmp_path):
    path = write(tmp_path / "a.yaml", BASE)
    assert load_config(path, overrides=["seed=1", "seed=2"]).seed == 2


def test_set_below_an_empty_section(tmp_path):
    path = write(tmp_path / "a.yaml", yaml.safe_dump(BASE) + "growth:\n")
    assert load_config(path, overrides=["growth.lag=3"]).growth.lag == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("seed=[", "the value is not YAML"),
        ("stages[5].steps=3", "'5' is not an index below 2"),
        ("stages.last.steps=3", "'last' is not an index below 2"),
        ("stages[2]={steps: 3}", "'2' is not an index below 2"),
        ("model.num_layers.x=3", "'x' lies inside a value that is not a mapping"),
        ("model.num_layers.x.y=3", "'x' lies inside a value that is not a mapping"),
    ],
)
def test_set_that_goes_nowhere(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        config(override)
    assert str(caught.value).startswith(f"--set {override}: ")


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})


# Growth of a stage


def test_a_stage_names_only_what_differs():
    run = config("growth={lag: 50, rungs: [10, 50], pool: {index: 0}}",
                 "stages[1].growth={pool: {block_size: 2}, eval_steps: [5]}")  # fmt: skip
    growth = run.growth_before(1)
    assert (growth.lag, growth.rungs, growth.eval_steps) == (50, (10, 50), (5,))
    assert (growth.pool.index, growth.pool.block_size) == (0, 2)
    assert run.growth.pool.block_size == "all"


def test_a_stage_without_growth_takes_the_global_one():
    run = config("growth.lag=50")
    assert run.growth_before(1) is run.growth


@pytest.mark.parametrize(
    ("settings", "rungs", "evaluations"),
    [
        ({"rule": "lag", "eval_steps": (3, 10)}, (40,), (0, 3, 10, 40)),
        ({"rule": "lag", "rungs": (10, 40)}, (40,), (0, 10, 40)),
        ({"rule": "lag", "rung_value": "mean"}, (40,), (0, 32, 40)),
        ({"rule": "lag", "lag": 0}, (0,), (0,)),
        ({}, (10, 20, 40), (0, 8, 10, 16, 20, 32, 40)),
        ({"rungs": (5, 40)}, (5, 40), (0, 4, 5, 32, 40)),
        ({"lag": 3}, (1, 2, 3), (0, 1, 2, 3)),
        ({"lag": "auto", "rule": "lag", "rungs": (5, 10)}, (5, 10), (0, 4, 5, 8, 10)),
    ],
)
def test_rungs_and_evaluations(settings, rungs, evaluations):
    growth = GrowthConfig(**{"rule": "halving", "lag": 40, **settings})
    assert growth.rung_steps() == rungs
    assert growth.evaluation_steps() == evaluations


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("growth.lag=auto", r"growth.rungs: lag auto looks for .* at least three"),
        ("growth={lag: auto, rungs: [5, 10, 999]}", r"growth.rungs: 999 is longer than the stage"),
        ("growth.eta=1", r"growth.eta: must be 2 or more"),
        ("growth.min_rank_correlation=1.5", r"growth.min_rank_correlation: must lie between"),
        ("growth.probe_groups=0", r"growth.probe_groups: must be 1 or more"),
        ("growth.rung_timeout=0", r"growth.rung_timeout: must be above 0 seconds"),
        ("parallel.timeout=0", r"parallel.timeout: must be above 0"),
        ("growth={exhaustive: true, eval_steps: [999]}", r"between 0 and the stage's end 300"),
    ],
)
def test_what_a_search_cannot_be(override, told):
    with pytest.raises(ConfigError, match=told):
        config(override)


# Dump and read back


def test_dump_round_trip(tmp_path):
    run = config(
        "stages[1].growth={lag: 9}",
        "growth.pool.index=[0, 2]",
        "deepspeed.x.y=[1]",
        "growth.pool.scale=[1, 0]",
    )
    path = write(tmp_path / "a.yaml", dump_config(run))
    assert load_config(path) == run


@given(
    lr=st.floats(1e-12, 1e3),
    eps=st.floats(1e-300, 1.0),
    steps=st.integers(1, 10**9),
    project=st.text(max_size=20),
    world_size=st.none() | st.integers(1, 64).map(lambda replicas: 4 * replicas),
)
def test_dump_round_trip_of_any_value(lr, eps, steps, project, world_size):
    values = tree()
    values["optimizer"] = {"lr": lr, "eps": eps}
    values["stages"] = [{"steps": steps}]
    values["tracking"] = {"wandb": {"project": project}}
    values["parallel"] = {"world_size": world_size, "micro_batch": 1, "global_batch": 4 * 2**20}
    values["parallel"]["global_batch"] *= world_size or 1
    run = parse_config(values)
    assert parse_config(yaml.safe_load(dump_config(run))) == run


# Shipped configurations


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configurations_load(path, tmp_path):
    run = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", dump_config(run))) == run
    if run.parallel.world_size is not None:
        data_parallel_size(run.parallel, world_size=run.parallel.world_size)
    for stage in range(1, len(run.stages)):
        source, target = run.layers_of(stage - 1), run.layers_of(stage)
        if target > source:
            pool = build_pool(
                run.growth_before(stage),
                source_layers=source,
                target_layers=target,
                seed=run.seed,
                init_std=run.model.init_std,
            )
            assert pool


def test_the_pool_of_the_paper_is_shipped():
    run = load_config(ROOT / "configs" / "gpt2_small_lag.yaml")
    growth = run.growth_before(1)
    pool = build_pool(growth, source_layers=12, target_layers=16, seed=1, init_std=0.02)
    assert len(pool) == 30
    assert (growth.lag, growth.rungs) == (200, (10, 25, 50, 100, 200))


# Cross-checks


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize(
    "path",
    [
        "model.num_layers",
        "model.hidden_size",
        "model.ffn_hidden_size",
        "model.num_attention_heads",
        "model.num_query_groups",
        "model.seq_length",
        "model.rotary_base",
        "model.norm_eps",
        "model.init_std",
        "data.validation_tokens",
        "parallel.tensor",
        "parallel.micro_batch",
        "parallel.global_batch",
        "parallel.world_size",
        "optimizer.lr",
        "optimizer.eps",
        "checkpoint.interval",
        "checkpoint.keep_last",
        "tracking.validation_interval",
        "tracking.log_interval",
    ],
)
def test_positive_values(path, value):
    lines = problems(f"{path}={value}")
    number = value if isinstance(_default(path), int | None) else f"{float(value)}"
    assert f"{path}: must be above 0 and finite (got {number})." in lines


def _default(path):
    node = config()
    for part in path.split("."):
        node = getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["model.hidden_size=30"],
            "model.hidden_size: 30 is not a multiple of num_attention_heads = 4.",
        ),
        (
            ["model.num_query_groups=3"],
            "model.num_attention_heads: 4 is not a multiple of num_query_groups = 3.",
        ),
        (
            ["parallel.tensor=4"],
            "model.num_query_groups: 2 is not a multiple of parallel.tensor = 4.",
        ),
        (
            ["parallel.tensor=2", "model.ffn_hidden_size=63"],
            "model.ffn_hidden_size: 63 is not a multiple of parallel.tensor = 2.",
        ),
        (
            ["parallel.tensor=2", "model.vocab_size=5001"],
            "model.vocab_size: 5001 is not a multiple of parallel.tensor = 2.",
        ),
        (["model.dropout=1"], "model.dropout: must be in [0, 1) (got 1.0)."),
        (["model.dropout=-0.1"], "model.dropout: must be in [0, 1) (got -0.1)."),
        (["model.label_smoothing=1"], "model.label_smoothing: must be in [0, 1) (got 1.0)."),
        (["model.z_loss=-1"], "model.z_loss: must not be negative (got -1.0)."),
        (["data.paths=[x]"], "data.paths: the source 'stdlib' takes no paths (got ['x'])."),
        (
            ["data.source=text"],
            "data.paths: the source 'text' needs at least one file, glob or folder.",
        ),
        (
            ["data.source=jsonl"],
            "data.paths: the source 'jsonl' needs at least one file, glob or folder.",
        ),
        (["data.validation_fraction=0"], "data.validation_fraction: must be in (0, 1) (got 0.0)."),
        (["data.validation_fraction=1"], "data.validation_fraction: must be in (0, 1) (got 1.0)."),
        (
            ["data.tokenizer.type=file"],
            "data.tokenizer.path: the type 'file' needs the path of a tokenizer.json.",
        ),
        (
            ["data.tokenizer.vocab_size=256"],
            "data.tokenizer.vocab_size: byte-level BPE needs 256 bytes and an end of document, "
            "so at least 257 (got 256).",
        ),
        (["optimizer.lr=.nan"], "optimizer.lr: must be above 0 and finite (got nan)."),
        (["optimizer.lr=.inf"], "optimizer.lr: must be above 0 and finite (got inf)."),
        (["optimizer.betas=[1, 0.9]"], "optimizer.betas.0: must be in [0, 1) (got 1.0)."),
        (["optimizer.betas=[0.9, -1]"], "optimizer.betas.1: must be in [0, 1) (got -1.0)."),
        (
            ["optimizer.weight_decay=-1"],
            "optimizer.weight_decay: must be finite and not negative (got -1.0).",
        ),
        (
            ["optimizer.grad_clip=.nan"],
            "optimizer.grad_clip: must be finite and not negative (got nan).",
        ),
        (
            ["optimizer.schedule.warmup_steps=-1"],
            "optimizer.schedule.warmup_steps: must be finite and not negative (got -1).",
        ),
        (
            ["optimizer.schedule.min_lr=1"],
            "optimizer.schedule.min_lr: 1.0 is above optimizer.lr 0.001.",
        ),
        (
            ["optimizer.schedule={name: cosine, warmup_steps: 9, decay_steps: 9}"],
            "optimizer.schedule.decay_steps: 9 must be after warmup_steps 9.",
        ),
        (["stages=[]"], "stages: at least one stage is needed, e.g. [{steps: 600}]."),
        (["stages[0].steps=0"], "stages.0.steps: must be above 0 (got 0)."),
        (
            ["stages[0].num_layers=5"],
            "stages.0.num_layers: the first stage has the model's 4 layers (got 5).",
        ),
        (
            ["stages[0].growth={lag: 3}"],
            "stages.0.growth: nothing grows before the first stage. Remove the key.",
        ),
        (
            ["stages[1].num_layers=3"],
            "stages.1.num_layers: 3 is fewer than the 4 of the stage before; stages only grow.",
        ),
        (["growth.lag=-1"], "growth.lag: must not be negative (got -1)."),
        (["growth.lag=301"], "growth.lag: 301 is longer than the stage that follows (300 steps)."),
        (
            ["stages[1].growth.lag=301"],
            "stages.1.growth.lag: 301 is longer than the stage that follows (300 steps).",
        ),
        (
            ["growth={lag: 9, rungs: [9, 5]}"],
            "growth.rungs: must be positive and strictly rising (got [9, 5]).",
        ),
        (
            ["growth={lag: 9, rungs: [5, 5, 9]}"],
            "growth.rungs: must be positive and strictly rising (got [5, 5, 9]).",
        ),
        (
            ["growth={lag: 9, rungs: [0, 9]}"],
            "growth.rungs: must be positive and strictly rising (got [0, 9]).",
        ),
        (["growth={lag: 9, rungs: [5]}"], "growth.rungs: the last rung 5 must be the lag 9."),
        (
            ["growth={lag: 9, eval_steps: [3, 10]}"],
            "growth.eval_steps: must lie between 0 and the lag 9 (got [3, 10]).",
        ),
        (
            ["growth.pool.init=[]"],
            "growth.pool.init: at least one of duplicate, random is needed.",
        ),
        (
            ["growth.pool.scale=[]"],
            "growth.pool.scale: one or more numbers from 0 to 1 are needed (got []).",
        ),
        (
            ["growth.pool.scale=[1, 1.5]"],
            "growth.pool.scale: one or more numbers from 0 to 1 are needed (got [1.0, 1.5]).",
        ),
        (
            ["growth.pool.operator=post_ln_identity"],
            "growth.pool.operator: 'post_ln_identity' is for post-LN models, but "
            "model.norm_position is 'pre'. Take 'llama_pro'.",
        ),
        (
            [
                "growth.pool={operator: staged, options: {}}",
                "stages[1].num_layers=8",
                "model.norm_position=post",
            ],
            "growth.pool.operator: 'staged' is for pre-LN models, but model.norm_position is "
            "'post'. Take 'post_ln_identity'.",
        ),
        (
            ["growth.pool.options={index: 3}"],
            "growth.pool.options: the operator 'lag' takes index, block_size, init and scale "
            "beside operator (got {'index': 3}). Move them there.",
        ),
        (
            ["growth.pool={operator: last, scale: [0.5]}"],
            "growth.pool.scale: is an axis of the operator 'lag' (got [0.5] for 'last'). Leave it "
            "out; others take a scale under options, if they have one.",
        ),
    ],
)
def test_contradictions(overrides, line):
    assert line in problems(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["growth.lag=0"],
        ["growth.lag=300"],
        ["growth={lag: 9, eval_steps: [0, 9]}"],
        ["model.vocab_size=300"],
        ["model.dropout=0"],
        ["optimizer={grad_clip: 0, weight_decay: 0}"],
        ["optimizer.schedule={name: cosine, min_lr: 0.001}"],
        ["parallel.tensor=2", "model.vocab_size=auto"],
        ["stages=[{steps: 1}]", "growth.lag=500"],
        ["stages[0].num_layers=4"],
        ["data={source: jsonl, paths: [x]}"],
        ["growth.pool.scale=[0, 0.5, 1]"],
        ["growth.pool={operator: slices, options: {layers: '0-3,2-3'}}"],
    ],
    ids=str,
)
def test_what_is_just_right(overrides):
    config(*overrides)


# The data-parallel size


@pytest.mark.parametrize(
    ("values", "world_size", "replicas"),
    [({}, 1, 1), ({}, 4, 4), ({"tensor": 2}, 4, 2), ({"world_size": 2, "tensor": 2}, 2, 1)],
)
def test_data_parallel_size(values, world_size, replicas):
    parallel = ParallelConfig(micro_batch=8, global_batch=32, **values)
    assert data_parallel_size(parallel, world_size=world_size) == replicas


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        (
            {"world_size": 4},
            2,
            "parallel.world_size: configured for 4 ranks, but 2 were started. "
            "Start 4 or change the key.",
        ),
        (
            {"tensor": 2},
            3,
            "parallel.tensor: 2 does not divide the world of 3 ranks. Start a multiple of 2 ranks.",
        ),
        (
            {"global_batch": 36},
            2,
            "parallel.global_batch: 36 sequences do not divide into micro_batch 8 x 2 "
            "data-parallel ranks = 16. Nearest: 32 or 48.",
        ),
        (
            {"global_batch": 4},
            1,
            "parallel.global_batch: 4 sequences do not divide into micro_batch 8 x 1 "
            "data-parallel ranks = 8. Nearest: 8 or 16.",
        ),
    ],
)
def test_data_parallel_size_that_does_not_come_out(values, world_size, message):
    with pytest.raises(ConfigError) as caught:
        data_parallel_size(ParallelConfig(micro_batch=8, **values), world_size=world_size)
    assert str(caught.value) == message


def test_a_configured_world_is_checked_with_the_rest():
    (line,) = problems("parallel.world_size=3")
    assert line.startswith(
        "parallel.global_batch: 32 sequences do not divide into micro_batch 8 x 3"
    )
    (line,) = problems("parallel={world_size: 3, tensor: 2}")
    assert line.startswith("parallel.tensor: 2 does not divide the world of 3 ranks.")


@pytest.mark.parametrize(
    ("key", "value", "rest"),
    [
        ("parallel.zero_stage", 3, "it has to be 0 or 1 or 2"),
        ("parallel.recompute", "layers", "it has to be none"),
        ("parallel.tensor", 2, "it has to be 1"),
        ("model.dropout", 0.1, "it has to be 0.0"),
    ],
)
def test_what_no_graph_can_replay(key, value, rest):
    config("parallel.cuda_graphs=true")
    (line,) = problems("parallel.cuda_graphs=true", f"{key}={value}")
    assert line.startswith(f"parallel.cuda_graphs: layers cannot be replayed with {key} {value}")
    assert rest in line
