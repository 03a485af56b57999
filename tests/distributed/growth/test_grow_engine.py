"""``grow_engine`` on engines that no code of ours has built.

Growing in place has to be the same, bit for bit, as growing on disk and having DeepSpeed load it.
"""

import pytest
import torch
from conftest import run_ranks
from full_state import tree_differences
from plain_program import CLIENT_STATE, GROW, STEPS, At, build, grow, train, train_and_save

from lag_megatron.engine.grow_engine import grow_engine

FAST = [(At(1, 2), At(2, 2)), (At(2, 2, "bf16"), At(3, 2, "bf16"))]
MATRIX = [
    (before, At(stage, world, precision))
    for before in (At(1, 2), At(3, 3, "bf16"))
    for stage in (0, 1, 2, 3)
    for world, precision in ((2, "fp32"), (3, "bf16"), (1, "fp32"))
    if (before, At(stage, world, precision)) not in FAST
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)]


def contents(engine):
    """All of an engine's state that a checkpoint has, of this rank."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    module = engine.module
    weights = {
        name: getattr(p, "ds_tensor", p).detach().clone() for name, p in module.named_parameters()
    }
    return {
        "weights": weights,
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "states": [
            {key: torch.as_tensor(value).clone() for key, value in inner.state[p].items()}
            for p in masters(optimizer)
        ],
        "masters": [p.detach().clone() for p in masters(optimizer)],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups],
        "scheduler": engine.lr_scheduler.state_dict(),
        "counts": (engine.global_steps, engine.global_samples, engine.skipped_steps),
    }


def masters(optimizer):
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    if hasattr(optimizer, "fp32_groups"):
        return [p for group in optimizer.fp32_groups for p in group]
    return [p for group in optimizer.param_groups for p in group["params"]]


def grow_both_ways(at, source, folder):
    """On each rank: differences between the two ways, before and after a step of training."""
    engine = build(at, 4)
    train(engine, [99])  # a state that has to be overwritten
    client_state = grow_engine(engine, source, GROW)
    here = contents(engine)
    losses = train(engine, [STEPS])
    trained = contents(engine)
    engine.destroy()
    other = build(at, 4)
    other.load_checkpoint(str(folder), "grown")
    found = tree_differences(here, contents(other))
    assert train(other, [STEPS]) == losses
    found += tree_differences(trained, contents(other))
    other.destroy()
    return found, client_state


@pytest.mark.parametrize(("before", "after"), CASES, ids=str)
def test_growing_in_place_is_growing_on_disk_and_loading(before, after, tmp_path):
    run_ranks(train_and_save, before.world, [(before, tmp_path)])
    grow(tmp_path / "source", tmp_path / "grown", GROW, after)
    results = run_ranks(grow_both_ways, after.world, after, tmp_path / "source", tmp_path)
    for found, client_state in results:
        assert found == []
        history = client_state.pop("lag")["growth_history"]
        assert [plan["operator"] for plan in history] == ["lag"]
        assert tree_differences(client_state, CLIENT_STATE) == []
