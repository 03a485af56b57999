"""Checkpoints of every family grow, and the engine takes them.

Whole tensors that are read from the shards are compared, bit for bit, with those of the source,
grown in plain torch; what claims to keep the function keeps the loss.
"""

import pytest
from conftest import PICO_VOCABULARY, run_ranks, sparing
from families import FAMILIES, family_batches, family_config
from full_state import differences, grow_full, read_full
from test_grow_matrix import DUPLICATE, EVENTS, RANDOM, fresh_weights, plan_of

from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan

KEPT = "kept"
PLANS = {
    DUPLICATE: plan_of(DUPLICATE),
    RANDOM: plan_of(RANDOM),
    KEPT: GrowthPlan(operator="post_ln_identity", source_layers=2, target_layers=4),
}


def plans_for(family):
    return PLANS if family == "bert-post" else {name: PLANS[name] for name in (DUPLICATE, RANDOM)}


def grow(config, folder, plans):
    """On each rank: the base's validation loss, and for each plan that after growth and one on."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    validation = [family_batches(config, world, 99)]
    source = Engine(config, world, num_layers=2, vocab_size=PICO_VOCABULARY)
    for step in range(3):
        source.train_step(family_batches(config, world, step), step=step, lr=1e-2)
    before = source.evaluate(validation)
    source.save(folder, "source", client_state={"step": 3})
    world.barrier()
    if world.is_coordinator:
        for name, plan in plans.items():
            grow_checkpoint(folder / "source", folder / name, plan)
    world.barrier()
    engine = Engine(config, world, num_layers=4, vocab_size=PICO_VOCABULARY, draw_weights=False)
    losses = {}
    for name in plans:
        engine.load(folder / name)
        engine.save(folder, f"{name}-again", client_state={})
        after = engine.evaluate(validation)
        engine.train_step(family_batches(config, world, 3), step=3, lr=1e-2)
        losses[name] = after + engine.evaluate(validation)
    stop_world()
    return before[0], losses


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Folder and losses of each case, run once where first asked for."""
    known = {}

    def outcome(family, tensor, stage):
        key = (family, tensor, stage)
        if key not in known:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            parallel = {"tensor": tensor, "zero_stage": stage}
            config = family_config(family, parallel=parallel)
            known[key] = (folder, run_ranks(grow, 2, config, folder, plans_for(family)))
        return known[key]

    return outcome


@pytest.mark.parametrize(
    ("family", "tensor", "stage"),
    sparing(
        [(family, tensor, stage) for family in FAMILIES for tensor in (1, 2) for stage in (1, 3)],
        slow=lambda at: at[0] == "gpt2" or at[1:] in ((1, 1), (2, 3)),
    ),
)
def test_what_was_grown_is_loaded(family, tensor, stage, outcomes):
    folder, results = outcomes(family, tensor, stage)
    assert len({str(result) for result in results}) == 1
    before, losses = results[0]
    topology = {"stage": stage, "data_size": 2 // tensor, "tensor_size": tensor}
    topology |= {"precision": "fp32", "gated": family == "llama"}
    source, _ = read_full(folder / "source", **topology)
    for event in (DUPLICATE, RANDOM):
        fresh = fresh_weights(2, 4) if event == RANDOM else None
        expected = grow_full(source, EVENTS[event][3], moments=EVENTS[event][4], fresh=fresh)
        for tag in (event, f"{event}-again"):
            found, steps = read_full(folder / tag, **topology)
            assert steps == {3.0}
            assert differences(found, expected) == [], tag
        assert losses[event][0] != before
    assert len({tuple(pair) for pair in losses.values()}) == len(losses)


@pytest.mark.parametrize(("tensor", "stage"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_post_norm_identity_keeps_the_loss(tensor, stage, outcomes):
    _, ((before, losses), *_) = outcomes("bert-post", tensor, stage)
    after, later = losses[KEPT]
    assert after == pytest.approx(before, abs=1e-5)
    assert later != pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("family", sparing(FAMILIES, slow=lambda family: family == "gpt2"))
def test_topologies_grow_alike(family, outcomes):
    one = outcomes(family, 1, 3)[1][0]
    other = outcomes(family, 2, 1)[1][0]
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    for name, losses in one[1].items():
        assert losses == pytest.approx(other[1][name], abs=1e-5)
