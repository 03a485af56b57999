"""Whole runs on forked ranks and their files: ``from whole_runs import train, losses_of``."""

import json
from pathlib import Path

from lag_megatron.config import load_config


def train(config_path, run_dir, overrides=(), resume="auto", fault=None):
    """On each rank: a run, with DeepSpeed's real engine."""
    from lag_megatron.training.train import TrainRequest, train

    if fault is not None:
        fault()
    train(TrainRequest(load_config(config_path, overrides=overrides), Path(run_dir), resume))


def lines_of(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses_of(run_dir, key):
    return {row["step"]: row[key] for row in lines_of(run_dir, "metrics.jsonl") if key in row}


def decision_of(run_dir):
    return json.loads((run_dir / "growth01" / "decision.json").read_text())
