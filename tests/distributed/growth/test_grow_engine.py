"""``grow_engine`` on engines that no code of ours has built.

Growing in place has to be the same, bit for bit, as growing on disk and having DeepSpeed load it.
"""

import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers_engines
from conftest import run_ranks
from full_state import tree_differences
from plain_program import (
    CLIENT_STATE,
    GROW,
    STEPS,
    At,
    Plain,
    build,
    grow,
    masters,
    train,
    train_and_save,
)
from transformers_engines import bert, llama

from lag_megatron.engine.grow_engine import grow_engine
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.plan import GrowthPlan

KEEP = GrowthPlan(operator="identity", source_layers=2, target_layers=2)
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


def grow_both_ways(at, source, folder, plan=GROW, build=build, train=train):
    """On each rank: differences between the two ways, before and after a step of training."""
    engine = build(at, plan.target_layers)
    train(engine, [99])  # a state that has to be overwritten
    client_state = grow_engine(engine, source, plan)
    here = contents(engine)
    losses = train(engine, [STEPS])
    trained = contents(engine)
    engine.destroy()
    other = build(at, plan.target_layers)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbered_states_of_zero0_are_in_the_order_of_the_engines_groups(precision, tmp_path):
    at = At(0, 1, precision)
    run_ranks(train_and_save, 1, [(at, tmp_path)])
    source, listed = tmp_path / "source", tmp_path / "listed"
    shutil.copytree(source, listed)
    named = [(n, p.dim()) for n, p in Plain(2).named_parameters() if p.requires_grad]
    groups = [[n for n, dim in named if dim > 1], [n for n, dim in named if dim == 1]]
    file = listed / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    torch.save(states | {"lag": {"parameter_groups": groups}}, file)
    after = At(2, 2, precision)
    grow(listed, tmp_path / "grown", GROW, after)
    for found, _ in run_ranks(grow_both_ways, 2, after, source, tmp_path):
        assert found == []


TRANSFORMERS = [
    (llama, True, At(1, 2)),
    (bert, True, At(2, 2)),
    pytest.param(llama, True, At(3, 2, "bf16"), marks=pytest.mark.slow),
    pytest.param(bert, True, At(0, 2, "bf16"), marks=pytest.mark.slow),
    # DeepSpeed compiles its own Adam when it is first asked for.
    pytest.param(llama, False, At(1, 2), marks=pytest.mark.slow),
    pytest.param(bert, False, At(3, 2, "bf16"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make_model", "torch_adam", "after"), TRANSFORMERS)
def test_a_model_of_transformers_grows_in_place(make_model, torch_adam, after, tmp_path):
    build = partial(transformers_engines.build, make_model=make_model, torch_adam=torch_adam)
    run_ranks(transformers_engines.save, 2, At(1, 2), tmp_path, build)
    plan = GrowthPlan.for_checkpoint(
        tmp_path / "source", operator="lag", layers=3, index=1, block_size=1, init="duplicate"
    )
    grow(tmp_path / "source", tmp_path / "grown", plan, after)
    ways = (tmp_path / "source", tmp_path, plan, build, transformers_engines.train)
    for found, client_state in run_ranks(grow_both_ways, 2, after, *ways):
        assert found == []
        assert set(client_state) == {"lag"}


def engine_of(at, layers=4, *, cast=None, optimizer=torch.optim.AdamW, frozen=False):
    """An engine with all parameters in one group."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(3)
    model = Plain(layers).to(cast)
    parameters = [p for p in model.parameters() if p.requires_grad or frozen]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer(parameters, lr=1e-3), config=at.config()
    )
    return engine


REFUSED = [
    (At(1, 2), lambda at: build(at, 3), CheckpointError, r"not in the model: layers\.3"),
    (At(3, 2), lambda at: build(at, 5), CheckpointError, r"missing: layers\.4.*with 4 layers"),
    (At(1, 2), engine_of, CheckpointError, "another order or other groups"),
    (At(0, 2), lambda at: engine_of(at, optimizer=torch.optim.SGD), PlanError, "optimizer is SGD"),
    (At(0, 2), lambda at: engine_of(at, frozen=True), PlanError, "frozen parameter position"),
    (At(0, 2), lambda at: engine_of(at, cast=torch.bfloat16), PlanError, "configured for fp32"),
    (replace(At(1, 2, "bf16"), wide_gradients=True), lambda at: build(at, 4), PlanError,
     "BF16_Optimizer.*lag_megatron.grow"),
]  # fmt: skip


def refused(source):
    """On each rank: the errors, and whether the weights are what they were."""
    found = []
    for at, make, kind, _ in REFUSED:
        engine = make(at)
        before = [getattr(p, "ds_tensor", p).clone() for p in engine.module.parameters()]
        with pytest.raises(kind) as error:
            grow_engine(engine, source, GROW)
        after = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found.append((str(error.value), same))
        engine.destroy()
    return found


def test_what_does_not_fit_is_refused_on_every_rank_before_anything_is_written(tmp_path):
    run_ranks(train_and_save, 2, [(At(1, 2), tmp_path)])
    results = run_ranks(refused, 2, tmp_path / "source")
    for (_, _, _, text), *ranks in zip(REFUSED, *results, strict=True):
        for message, same in ranks:
            assert re.search(text, message), message
            assert same


def refuses_damage(source):
    engine = build(At(1, 2), 4)
    with pytest.raises(CheckpointError, match="damaged"):
        grow_engine(engine, source, GROW)
    return True


def test_a_damaged_source_is_refused_on_every_rank(tmp_path):
    run_ranks(train_and_save, 2, [(At(1, 2), tmp_path)])
    grow(tmp_path / "source", tmp_path / "copy", KEEP, At(1, 2))
    file = tmp_path / "copy" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run_ranks(refuses_damage, 2, tmp_path / "copy") == [True, True]
