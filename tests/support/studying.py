"""What the tests of studies share: a small study, and the operations of its steps by hand."""

from pathlib import Path

import yaml

from lag_megatron.study import load_study, plan_study

TOKENS = 8 * 32
BASE = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "seq_length": 32,
        "vocab_size": 384,
    },
    "data": {"validation_tokens": 1024},
    "optimizer": {"lr": 3e-3, "schedule": {"warmup_steps": 4}},
    "parallel": {"micro_batch": 2, "global_batch": 8},
    "stages": [{"steps": 10}],
    "growth": {"rule": "lag", "lag": 3, "rungs": [1, 3]},
}
GROWN = [{"steps": 10}, {"steps": 12, "num_layers": 3}]
LAST = {"pool": {"operator": "last"}}
ARMS = {
    "lag": {"stages": GROWN},
    "last": {"stages": [GROWN[0], {**GROWN[1], "growth": LAST}]},
    "scratch": {"model": {"num_layers": 3}, "stages": [{"steps": 10}]},
}
STUDY = {
    "base": "base.yaml",
    "seeds": [1, 2],
    "budget": {"of": "lag"},
    "reference": "scratch",
    "arms": ARMS,
    "learning_rates": {"constant": {}},
}


def a_step(layers: int) -> int:
    """Operations of a training step: 6 a weight and token, causal attention, the output layer."""
    weights = layers * (4 * 32 * 32 + 2 * 32 * 64) + 384 * 32
    return TOKENS * (6 * weights + 6 * layers * 32 * 32)


def write(folder: Path, base: dict | None = None, **changes: object) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, **(base or {})}))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return path


def plan_of(folder: Path, base: dict | None = None, **changes: object):
    return plan_study(load_study(write(folder, base, **changes)))
