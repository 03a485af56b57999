"""Sequence parallelism and recomputation change no loss, under every ZeRO stage and family."""

import pytest
from conftest import PICO_VOCABULARY, run_ranks, sparing
from families import family_batches, family_config

# fp32 sums in another order; a curve is 4 steps at a learning rate of 1e-2.
TOLERANCE = 1e-5


def curve(config):
    """Losses and gradient norms of 4 steps, then a validation loss."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    before = engine.evaluate([family_batches(config, world, 9)])
    same = family_batches(config, world, 0)  # again and again, so that the loss falls
    results = [engine.train_step(same, step=i, lr=1e-2) for i in range(4)]
    after = engine.evaluate([family_batches(config, world, 9)])
    stop_world()
    return [r.loss for r in results], [r.grad_norm for r in results], before + after


@pytest.fixture(scope="module")
def one_rank():
    """The curve of a single rank without ZeRO, of each family."""
    known = {}

    def run(family):
        if family not in known:
            known[family] = run_ranks(curve, 1, family_config(family, zero_stage=0))[0]
        return known[family]

    return run


def check(config, world_size, expected):
    results = run_ranks(curve, world_size, config)
    losses, norms, validation = expected
    assert losses[-1] < losses[0] - 0.05
    for found in results:
        assert found[0] == pytest.approx(losses, abs=TOLERANCE)
        assert found[1] == pytest.approx(norms, rel=1e-4)
        assert found[2] == pytest.approx(validation, abs=TOLERANCE)


SEQUENCE = {"tensor": 2, "sequence_parallel": True}
BOTH = {**SEQUENCE, "recompute": "layers"}


@pytest.mark.parametrize(
    ("family", "stage", "parallel"),
    sparing(
        [
            *(("gpt2", stage, SEQUENCE) for stage in range(4)),
            *(("llama", stage, BOTH) for stage in (1, 3)),
            *((family, 1, SEQUENCE) for family in ("bert-post", "bert-pre")),
            ("bert-post", 3, BOTH),
            *(("bert-post", stage, {"tensor": 1, "recompute": "layers"}) for stage in (1, 3)),
            ("bert-pre", 2, {"tensor": 2}),
            ("bert-post", 0, {"tensor": 2}),
            ("gpt2", 3, {"tensor": 1, "recompute": "layers"}),
        ],
        slow=lambda at: (
            at[:2] in (("gpt2", 0), ("gpt2", 2), ("llama", 1), ("bert-pre", 2), ("bert-post", 0))
        ),
    ),
    ids=str,
)
def test_one_curve_whatever_is_saved(family, stage, parallel, one_rank):
    config = family_config(family, zero_stage=stage, parallel=parallel)
    check(config, 2, one_rank(family))


@pytest.mark.parametrize(
    ("family", "parallel"),
    sparing(
        [
            ("gpt2", SEQUENCE),
            ("bert-post", {"tensor": 2}),
            ("gpt2", {"tensor": 2}),
            ("bert-post", SEQUENCE),
        ],
        slow=lambda at: at[1] == ({"tensor": 2} if at[0] == "gpt2" else SEQUENCE),
    ),
    ids=str,
)
def test_recomputation_draws_the_same_dropout(family, parallel):
    plain, recomputed = (
        family_config(family, dropout=0.3, parallel={**parallel, "recompute": recompute})
        for recompute in ("none", "layers")
    )
    expected = run_ranks(curve, 2, plain)
    still = run_ranks(curve, 2, family_config(family, parallel=parallel))
    found = run_ranks(curve, 2, recomputed)
    assert expected[0][0] != pytest.approx(still[0][0], abs=1e-2)  # there is dropout
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-6)
        assert one[1] == pytest.approx(other[1], rel=1e-5)


def streams(config):
    """Dropout masks of what sequence parallelism splits, on each rank."""
    import torch

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine
    from lag_megatron.model.random_state import seed_step

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(config, world, num_layers=1, vocab_size=PICO_VOCABULARY)
    model, kept = engine.module, []
    hook = model.embedding.embedding_dropout.register_forward_hook(
        lambda _, inputs, output: kept.append(output != 0)
    )
    model.train()
    seed_step(1, 2, world)
    batch = family_batches(config, world, 0)[0]
    with torch.no_grad():
        model(batch["tokens"], batch["position_ids"], None)
    hook.remove()
    stop_world()
    return kept[0]


def test_parts_of_the_sequence_have_dropout_of_their_own():
    config = family_config("gpt2", dropout=0.5, parallel=SEQUENCE)
    one, other = run_ranks(streams, 2, config)
    assert one.shape == other.shape == (4, 1, 16)
    assert (one != other).float().mean() == pytest.approx(0.5, abs=0.25)
    whole = run_ranks(streams, 2, family_config("gpt2", dropout=0.5, parallel={"tensor": 2}))
    assert (whole[0] == whole[1]).all()


@pytest.mark.parametrize(
    ("family", "stage", "parallel"),
    [("bert-post", 3, {"tensor": 1}), ("bert-pre", 1, BOTH), ("llama", 2, BOTH)],
    ids=str,
)
def test_bf16_follows_fp32(family, stage, parallel, one_rank):
    config = family_config(family, zero_stage=stage, precision="bf16", parallel=parallel)
    expected = one_rank(family)[0]
    for losses, _, _ in run_ranks(curve, 2, config):
        assert losses != expected
        assert losses == pytest.approx(expected, abs=0.05)


def said(config):
    """What Megatron-Core warns of while the model of a run is made."""
    import logging

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines = []
    logging.getLogger("megatron").addHandler(Kept(logging.WARNING))
    world = start_world(tensor=1)
    Engine(config, world, num_layers=2, vocab_size=PICO_VOCABULARY)
    stop_world()
    return lines


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert-post", "bert-pre"])
def test_layers_are_made_without_warnings(family):
    """Each would come once a layer, and again for each candidate."""
    assert run_ranks(said, 1, family_config(family, zero_stage=1)) == [[]]
