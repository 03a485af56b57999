"""Values that are out of bounds or contradict each other, and those that are just right."""

import pytest
from configuring import config, problems

from lag_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("growth.lag=auto", r"growth.rungs: lag auto looks for .* at least three"),
        ("growth={lag: auto, rungs: [5, 10, 999]}", r"growth.rungs: 999 is longer than the stage"),
        ("growth.eta=1", r"growth.eta: must be 2 or more"),
        ("growth.min_rank_correlation=1.5", r"growth.min_rank_correlation: must lie between"),
        ("growth.probe_groups=0", r"growth.probe_groups: must be 1 or more"),
        ("growth.rung_timeout=0", r"growth.rung_timeout: must be above 0 and at most"),
        ("parallel.timeout=0", r"parallel.timeout: must be above 0"),
        ("growth={exhaustive: true, eval_steps: [999]}", r"between 0 and the stage's end 300"),
    ],
)
def test_what_a_search_cannot_be(override, message):
    with pytest.raises(ConfigError, match=message):
        config(override)


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
    with_limit = path in ("model.num_layers", "model.seq_length") or path.startswith(
        ("parallel.tensor", "parallel.world_size")
    )
    allowed = "1 or more" if with_limit else "above 0 and finite"
    assert f"{path}: must be {allowed} (got {number})." in lines


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
        (["optimizer.lr=.nan"], "optimizer.lr: must be a finite number (got nan)."),
        (["optimizer.lr=.inf"], "optimizer.lr: must be a finite number (got inf)."),
        (["optimizer.betas=[1, 0.9]"], "optimizer.betas.0: must be in [0, 1) (got 1.0)."),
        (["optimizer.betas=[0.9, -1]"], "optimizer.betas.1: must be in [0, 1) (got -1.0)."),
        (
            ["optimizer.weight_decay=-1"],
            "optimizer.weight_decay: must be finite and not negative (got -1.0).",
        ),
        (
            ["optimizer.grad_clip=.nan"],
            "optimizer.grad_clip: must be a finite number (got nan).",
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
