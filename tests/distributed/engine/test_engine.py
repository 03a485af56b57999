"""One loss curve whatever the topology; resume that leaves no trace; refusal of other models."""

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, sparing
from full_state import differences, read_full

from lag_megatron.errors import CheckpointError, RunError

# fp32 sums in another order; a curve is 4 steps at a learning rate of 1e-2.
TOLERANCE = 1e-5


def build(config):
    from lag_megatron.distributed.world import start_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    layers = config.model.num_layers
    return world, Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)


def steps(engine, config, world, first, last, lr=1e-2):
    return [
        engine.train_step(random_batches(config, world, step), step=step, lr=lr)
        for step in range(first, last)
    ]


def curve(config):
    """Losses and gradient norms of 4 steps, then validation losses of 2 batches."""
    from lag_megatron.distributed.world import stop_world

    world, engine = build(config)
    same = random_batches(config, world, 0)  # again and again, so that the loss falls
    results = [engine.train_step(same, step=i, lr=1e-2) for i in range(4)]
    validation = engine.evaluate([random_batches(config, world, step) for step in (100, 101)])
    stop_world()
    return [r.loss for r in results], [r.grad_norm for r in results], validation


@pytest.fixture(scope="module")
def reference():
    """The curves of a single rank without ZeRO, of both architectures."""
    return {
        llama: run_ranks(curve, 1, pico_config(zero_stage=0, llama=llama))[0]
        for llama in (False, True)
    }


@pytest.mark.parametrize(
    ("world_size", "tensor", "stage", "llama"),
    sparing(
        [
            *((2, 1, stage, False) for stage in range(4)),
            *((2, 2, stage, False) for stage in range(4)),
            *((1, 1, stage, False) for stage in (1, 3)),
            (4, 2, 1, False),
            (2, 1, 2, True),
            (2, 2, 1, True),
        ],
        slow=lambda at: at[1:] in ((2, 0, False), (2, 2, False), (1, 2, True)),
    ),
)
def test_one_curve_whatever_the_topology(world_size, tensor, stage, llama, reference):
    config = pico_config(zero_stage=stage, tensor=tensor, llama=llama)
    results = run_ranks(curve, world_size, config)
    losses, norms, validation = reference[llama]
    assert losses[-1] < losses[0] - 0.1
    for found in results:
        assert found == results[0]
    assert results[0][0] == pytest.approx(losses, abs=TOLERANCE)
    assert results[0][1] == pytest.approx(norms, rel=1e-4)
    assert results[0][2] == pytest.approx(validation, abs=TOLERANCE)


def test_bf16_follows_fp32_and_keeps_fp32_masters(reference):
    losses = run_ranks(curve, 2, pico_config(precision="bf16"))[0][0]
    assert losses != reference[False][0]
    assert losses == pytest.approx(reference[False][0], abs=0.05)


def stop_and_resume(config, folder):
    """Three ways from step 3 to 6: straight on, in a new engine, in one that went elsewhere."""
    from lag_megatron.distributed.world import stop_world
    from lag_megatron.engine.engine import Engine

    world, engine = build(config)
    layers = config.model.num_layers
    steps(engine, config, world, 0, 3)
    engine.save(folder, "step3", client_state={"step": 3, "note": [1, "a"]})
    straight = steps(engine, config, world, 3, 6)
    engine.save(folder, "straight", client_state={})
    fresh = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    state = fresh.load(folder / "step3")
    resumed = steps(fresh, config, world, 3, 6)
    fresh.save(folder, "resumed", client_state={})
    steps(engine, config, world, 50, 53, lr=1e-1)
    engine.load(folder / "step3")
    returned = steps(engine, config, world, 3, 6)
    engine.save(folder, "returned", client_state={})
    stop_world()
    return state, straight, resumed, returned


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "tensor"),
    sparing(
        [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2)],
        slow=lambda at: at in ((0, 1), (2, 1), (0, 2)),
    ),
)
def test_resume_is_as_if_nothing_had_happened(stage, tensor, precision, tmp_path):
    config = pico_config(zero_stage=stage, tensor=tensor, precision=precision)
    results = run_ranks(stop_and_resume, 2, config, tmp_path)
    topology = {
        "stage": stage,
        "data_size": 2 // tensor,
        "tensor_size": tensor,
        "precision": precision,
    }
    expected, counts = read_full(tmp_path / "straight", **topology)
    assert counts == {6.0}
    for state, straight, resumed, returned in results:
        assert (state["step"], state["note"], state["num_layers"]) == (3, [1, "a"], 2)
        assert resumed == straight
        assert returned == straight
    for tag in ("resumed", "returned"):
        found, counts = read_full(tmp_path / tag, **topology)
        assert counts == {6.0}
        assert differences(found, expected) == []


def test_resume_with_dropout(tmp_path):
    config = pico_config(dropout=0.3)
    _, straight, resumed, returned = run_ranks(stop_and_resume, 2, config, tmp_path)[0]
    assert straight == resumed == returned


def save_once(config, folder):
    from lag_megatron.distributed.world import stop_world

    world, engine = build(config)
    steps(engine, config, world, 0, 1)
    engine.save(folder, "tag", client_state={})
    stop_world()


def load_into_each(configs, path):
    """What the engine of each configuration says of the checkpoint; None if it takes it."""
    messages = []
    for config in configs:
        _, engine = build(config)
        before = [p.detach().clone() for p in engine.module.parameters()]
        try:
            engine.load(path)
            messages.append(None)
        except CheckpointError as error:
            after = list(engine.module.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_architecture_is_refused(stage, tmp_path):
    run_ranks(save_once, 2, pico_config(zero_stage=stage), tmp_path)
    others = (
        ({"num_layers": 3}, "missing: decoder.layers.2."),
        ({"num_layers": 1}, "not in the model: decoder.layers.1."),
        ({"ffn_hidden_size": 48}, "shape (32, 16), expected (48, 16)"),
        ({"llama": True}, "output_layer.weight"),
    )
    configs = [pico_config(zero_stage=stage, **other) for other in ({}, *(o for o, _ in others))]
    for taken, *refused in run_ranks(load_into_each, 2, configs, tmp_path / "tag"):
        assert taken is None
        for message, (_, part) in zip(refused, others, strict=True):
            assert "holds another architecture than the configuration" in message
            assert part in message


def test_no_checkpoint_is_an_error_of_ours(tmp_path):
    ((message,),) = run_ranks(load_into_each, 1, [pico_config()], tmp_path / "none")
    assert "not a DeepSpeed checkpoint" in message


def test_ranks_have_to_divide():
    with pytest.raises(RunError, match="does not divide the world of 3 ranks"):
        run_ranks(build, 3, pico_config(tensor=2))


def spoiled(config, folder):
    """Save a state of which the last rank's first buffer of masters holds an infinity."""
    world, engine = build(config)
    steps(engine, config, world, 0, 2)
    if world.rank == world.size - 1:
        with torch.no_grad():
            engine.state.masters[0].view(-1)[3] = float("inf")
    engine.save(folder, "step2", client_state={"step": 2})


def refusals(configs, path):
    """What the engine of each configuration says of a checkpoint."""
    messages = []
    for config in configs:
        _, engine = build(config)
        with pytest.raises(CheckpointError) as caught:
            engine.load(path)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("stage", [1, 3])
def test_values_that_are_not_finite_are_refused(stage, tmp_path):
    """On every rank, where DeepSpeed loads them and where they are resharded in place."""
    config = pico_config(zero_stage=stage)
    run_ranks(spoiled, 2, config, tmp_path)
    configs = [config, pico_config(zero_stage=1 if stage == 3 else 2)]
    for messages in run_ranks(refusals, 2, configs, tmp_path / "step2"):
        for message in messages:
            assert (
                "the weight has 1 value that is not finite, the first (inf) at index [" in message
            )
            assert "on data-parallel rank 1 of tensor-parallel rank 0" in message
