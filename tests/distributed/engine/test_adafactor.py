"""Factored states under the engine: trained, resumed, grown, refused where they have no rows."""

import dataclasses
import re

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, train_and_save
from full_state import tree_differences
from switching import PLANS, same_files, switch_from_cache, switch_in_place
from test_engine import build, load_into_each, steps, stop_and_resume

from lag_megatron.checkpoint.zero.describe import describe_zero
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config import OptimizerConfig
from lag_megatron.errors import PlanError
from lag_megatron.growth.apply.estimate import estimate_growth
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import GrownState, retarget

FILE = "mp_rank_00_model_states.pt"


def adafactor(layers=2, precision="fp32", global_batch=4):
    config = pico_config(zero_stage=0, num_layers=layers, precision=precision)
    return dataclasses.replace(
        config,
        optimizer=OptimizerConfig(name="adafactor", weight_decay=0.1, grad_clip=0.0),
        parallel=dataclasses.replace(config.parallel, global_batch=global_batch),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of 2 layers on 2 ranks."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(train_and_save, 2, adafactor(), folder)
    return folder / "step3"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_as_if_nothing_had_happened(precision, tmp_path):
    config = adafactor(precision=precision)
    for _, straight, resumed, returned in run_ranks(stop_and_resume, 2, config, tmp_path):
        assert straight == resumed == returned
        assert straight[-1].loss != straight[0].loss
    expected = torch.load(tmp_path / "straight" / FILE, weights_only=False)
    for tag in ("resumed", "returned"):
        found = torch.load(tmp_path / tag / FILE, weights_only=False)
        differences = tree_differences(found, expected)
        assert [d for d in differences if not d.startswith("/lag/")] == []


def reference(engine, config, states, first, last):
    """Losses of torch's own Adafactor in one process, from the engine's weights and ``states``."""
    from lag_megatron.model import build_model, loss_sums

    class Whole:
        data_size, data_rank = 1, 0

    model = build_model(
        config.model,
        config.parallel,
        num_layers=config.model.num_layers,
        vocab_size=PICO_VOCABULARY,
    )
    named = dict(model.named_parameters())
    for name, weights in engine.module.named_parameters():
        named[name].data.copy_(weights.data)
    matrices, vectors = ([p for p in named.values() if (p.dim() > 1) == big] for big in (1, 0))
    optimizer = torch.optim.Adafactor(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        eps=(1e-15, 1e-3),
    )
    for name, state in states.items():
        optimizer.state[named[name]] = {key: value.clone() for key, value in state.items()}
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        batches = random_batches(config, Whole, step)
        labels = sum(float(batch["loss_mask"].sum()) for batch in batches)
        sums = [loss_sums(model, batch).sum() / labels for batch in batches]
        for loss in sums:
            loss.backward()
        optimizer.step()
        losses.append(sum(loss.item() for loss in sums))
    return losses


def saved_states(checkpoint):
    """Names to what the optimizer keeps, read from the file without the library's readers."""
    objects = torch.load(checkpoint / FILE, weights_only=False)
    names = [name for group in objects["lag"]["parameter_groups"] for name in group]
    return {name: objects["optimizer"]["state"][i] for i, name in enumerate(names)}


def source_of(name, sources):
    """The old model's name of what a parameter of the grown one comes from."""
    return re.sub(r"(?<=layers\.)\d+", lambda match: str(sources[int(match[0])]), name)


def beside_torch(config, grown_config, base):
    """Losses of the engine and of the reference: from nothing, and after each way of growing."""
    from lag_megatron.distributed.world import stop_world

    world, engine = build(config)
    expected = reference(engine, config, {}, 0, 4)
    pairs = {"from nothing": ([r.loss for r in steps(engine, config, world, 0, 4)], expected)}
    _, engine = build(grown_config)
    for name in ("duplicate", "random"):
        plan = PLANS[name]
        engine.grow_from(GrownState(ZeroCheckpoint.open(base), plan, engine.topology))
        sources = [origin.source for origin in plan.layer_map]
        names = dict(engine.module.named_parameters())
        states = {name: saved_states(base)[source_of(name, sources)] for name in names}
        expected = reference(engine, grown_config, states, 3, 6)
        pairs[name] = ([r.loss for r in steps(engine, grown_config, world, 3, 6)], expected)
    stop_world()
    return pairs


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_engine_follows_torchs_adafactor(world_size, base):
    results = run_ranks(beside_torch, world_size, adafactor(), adafactor(layers=4), base)
    for found in results:
        assert found.keys() == {"from nothing", "duplicate", "random"}
        for name, (losses, expected) in found.items():
            assert losses == pytest.approx(expected, abs=1e-5), name
            assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_place_equals_disk(precision, base, tmp_path):
    config = adafactor(layers=4, precision=precision)
    for losses in run_ranks(switch_in_place, 2, config, base, tmp_path):
        for name, (loaded, grown) in losses.items():
            assert loaded == grown, name
    for name in PLANS:
        assert same_files(tmp_path / f"{name}-loaded", tmp_path / f"{name}-grown") > 0
        assert same_files(tmp_path / f"{name}-saved", tmp_path / f"{name}-written") > 0


def test_a_kept_base_gives_the_same_means(base, tmp_path):
    """Means over rows and columns lie in buffers of their own."""
    config = adafactor(layers=4)
    for losses in run_ranks(switch_from_cache, 2, config, base, tmp_path, PLANS):
        for name, (there, here) in losses.items():
            assert there == here, name
    for name in PLANS:
        assert same_files(tmp_path / f"{name}-shards", tmp_path / f"{name}-cached") > 0


@pytest.mark.parametrize("moments", ["copy", "zero", "borrow"])
def test_means_of_new_layers(moments, base, tmp_path):
    plan = dataclasses.replace(PLANS["duplicate"], moments=moments)
    growth = grow_checkpoint(base, tmp_path / "grown", plan)
    old, new = saved_states(base), saved_states(tmp_path / "grown")
    fc1 = "decoder.layers.{}.mlp.linear_fc1.{}"
    for layer, origin in enumerate(plan.layer_map):
        for kind, keys in (("weight", {"row_var", "col_var"}), ("bias", {"variance"})):
            found, source = new[fc1.format(layer, kind)], old[fc1.format(origin.source, kind)]
            assert found.keys() == {"step", *keys}
            for key in keys:
                assert source[key].any()
                dropped = moments == "zero" and origin.is_new
                assert torch.equal(found[key], source[key] * (not dropped))
    steps_taken = {state["step"].data_ptr() for state in new.values()}
    assert len(steps_taken) == len(new)
    facts = describe_zero(tmp_path / "grown")
    assert facts["optimizer_states"] == ["fp32", "row_var", "col_var", "variance"]
    kept = sum(v.numel() for s in new.values() for k, v in s.items() if k != "step")
    assert growth.bytes_to_write == 4 * (facts["parameters"] + kept)
    assert estimate_growth(growth, workers=1).write == growth.bytes_to_write


def test_states_without_rows_are_refused(base, tmp_path):
    source = ZeroCheckpoint.open(base)
    for change in ({"zero_stage": 1}, {"tensor_size": 2}):
        topology = retarget(source.topology, **change)
        with pytest.raises(PlanError, match="Adafactor's means over rows and columns"):
            grow_checkpoint(base, tmp_path / "target", PLANS["duplicate"], topology=topology)


def test_another_optimizers_checkpoint_is_refused(base, tmp_path):
    run_ranks(train_and_save, 2, pico_config(zero_stage=0), tmp_path)
    for ranks in (1, 2):  # another number of ranks takes another path
        adam, factored = pico_config(zero_stage=0), adafactor()
        ((taken, refused),) = set(
            map(tuple, run_ranks(load_into_each, ranks, [factored, adam], base))
        )
        assert taken is None
        assert "holds the states of adafactor, but optimizer.name is adamw" in refused
        (refused,) = run_ranks(load_into_each, ranks, [factored], tmp_path / "step3")[0]
        assert "holds the states of adamw, but optimizer.name is adafactor" in refused
