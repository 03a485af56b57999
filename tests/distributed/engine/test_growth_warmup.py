"""New layers at a rate of their own are as if all had had it, under every ZeRO stage."""

import pytest
import torch
from conftest import PICO_VOCABULARY, random_batches, run_ranks, sparing, train_and_save
from full_state import differences, read_full
from switching import PLANS, config_of
from test_adafactor import adafactor
from whole_runs import losses_of, train

from lag_megatron.config import load_config
from lag_megatron.errors import RunError
from lag_megatron.planning.lr_schedule import rate_at

FACTOR, LR = 0.25, 1e-2
PLAN = PLANS["random"]
NEW = tuple(f".layers.{layer}." for layer in sorted(PLAN.new_layers))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of 2 layers on 2 ranks."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(train_and_save, 2, config_of(1, "fp32", 1), folder)
    return folder / "step3"


def one_step_each(config, base, folder):
    """Save the state after one step from the same grown state, at three choices of rates."""
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine
    from lag_megatron.growth.apply.grow_zero import grow_checkpoint
    from lag_megatron.growth.apply.grown_state import GrownState

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=4, vocab_size=PICO_VOCABULARY)
    with pytest.raises(RunError, match="does not say which layers"):
        engine.train_step(random_batches(config, world, 0), step=0, lr=LR, new_layers=0.5)
    growth = GrownState(ZeroCheckpoint.open(base), PLAN, engine.topology)
    if world.is_coordinator:
        grow_checkpoint(base, folder / "grown", PLAN, topology=engine.topology)
    world.barrier()
    engine.load(folder / "grown")
    loaded = engine.train_step(random_batches(config, world, 3), step=3, lr=LR, new_layers=FACTOR)
    engine.save(folder, "loaded", client_state={})
    for tag, rates in (
        ("full", {"lr": LR}),
        ("part", {"lr": LR * FACTOR}),
        ("both", {"lr": LR, "new_layers": FACTOR}),
    ):
        engine.grow_from(growth)
        result = engine.train_step(random_batches(config, world, 3), step=3, **rates)
        assert result == loaded
        engine.save(folder, tag, client_state={})
    stop_world()


@pytest.mark.parametrize(
    ("stage", "precision", "tensor"),
    sparing(
        [(0, "fp32", 1), (0, "bf16", 1), (1, "bf16", 1), (2, "fp32", 2), (3, "fp32", 1)],
        slow=lambda at: at in ((0, "fp32", 1), (2, "fp32", 2)),
    ),
)
def test_new_layers_take_their_part_of_the_step(stage, precision, tensor, base, tmp_path):
    config = config_of(stage, precision, tensor, layers=4)
    run_ranks(one_step_each, 2, config, base, tmp_path)
    topology = {"stage": stage, "data_size": 2 // tensor, "tensor_size": tensor}
    full, part, both, loaded = (
        read_full(tmp_path / tag, **topology, precision=precision)[0]
        for tag in ("full", "part", "both", "loaded")
    )
    assert differences(both, loaded) == []
    seen = set()
    for (state, name), found in both.items():
        is_new = any(layer in name for layer in NEW)
        seen.add(is_new)
        if state in ("fp32", "weight") and is_new:
            tolerance = 1e-6 if state == "fp32" or precision == "fp32" else 1e-2
            torch.testing.assert_close(found, part[state, name], rtol=tolerance, atol=1e-7)
            if state == "fp32":
                assert not torch.equal(found, full[state, name]) or not found.any()
        else:
            assert torch.equal(found, full[state, name]), (state, name)
    assert seen == {True, False}


def test_adafactor_too(tmp_path):
    run_ranks(train_and_save, 2, adafactor(), tmp_path)
    run_ranks(one_step_each, 2, adafactor(layers=4), tmp_path / "step3", tmp_path)
    full, part, both = (
        torch.load(tmp_path / tag / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for tag in ("full", "part", "both")
    )
    for name, found in both.items():
        if torch.is_tensor(found) and any(layer in name for layer in NEW):
            torch.testing.assert_close(found, part[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(found, full[name])
        elif torch.is_tensor(found):
            assert torch.equal(found, full[name])


@pytest.mark.slow
def test_a_run_with_adafactor_rewound_and_risen_anew(tiny, tmp_path):
    schedule = "{name: cosine, warmup_steps: 4, growth_warmup_steps: 5, growth_warmup: new}"
    overrides = [
        "parallel.zero_stage=0",
        "optimizer={name: adafactor, lr: 0.02}",
        f"optimizer.schedule={schedule}",
        "stages=[{steps: 10}, {steps: 10, num_layers: 3, schedule_position: 6}]",
    ]
    run = tmp_path / "run"
    run_ranks(train, 2, tiny, run, overrides)
    config = load_config(tiny, overrides=overrides)
    rates = [rate_at(step, config) for step in range(20)]
    assert losses_of(run, "train/lr") == {i: rate.lr for i, rate in enumerate(rates, 1)}
    assert rates[10].lr == rates[6].lr
    expected = {11 + i: rates[10 + i].lr * (i + 1) / 5 for i in range(4)}
    assert losses_of(run, "train/lr_new_layers") == pytest.approx(expected)
    validation = losses_of(run, "val/loss")
    assert validation[20] < validation[0] - 0.1
