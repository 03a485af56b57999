"""Layers that are replayed train as layers that are run, bit for bit.

On a CPU the replay runs the captured work again, on the same tensors at the same addresses: what is
tested there is everything but CUDA's own recording, which the tests marked gpu add.
"""

import dataclasses

import pytest
import torch
from conftest import (
    PICO_VOCABULARY,
    pico_config,
    random_batches,
    run_alone,
    run_ranks,
    train_and_save,
)
from switching import PLANS

from lag_megatron.errors import ConfigError

STEPS = 3


class Rerun:
    """A capture whose replay runs the work again and leaves the results where they were."""

    def warm_up(self, work):
        work()

    def record(self, work):
        results = work()

        def replay():
            for kept, made in zip(results, work(), strict=True):
                kept.copy_(made)

        return results, replay


def losses_of(engine, config, world, first):
    return [
        engine.train_step(random_batches(config, world, step), step=step, lr=1e-2).loss
        for step in range(first, first + STEPS)
    ]


def trained(config, base, graphed):
    """Losses before and after two switches of candidates, and of evaluations between."""
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine
    from lag_megatron.growth.apply.grown_state import GrownState
    from lag_megatron.model.cuda_graphs import capture_layers

    world = start_world(tensor=1)
    engine = Engine(config, world, num_layers=4, vocab_size=PICO_VOCABULARY)
    if graphed and not config.parallel.cuda_graphs:
        capture_layers(engine.module, Rerun)
    found = [losses_of(engine, config, world, 0)]
    for name in ("duplicate", "random"):
        growth = GrownState(ZeroCheckpoint.open(base), PLANS[name], engine.topology)
        engine.grow_from(growth)
        found.append(engine.evaluate([random_batches(config, world, 99)]))
        found.append(losses_of(engine, config, world, 10))
    graphs = [
        len(layer.forward._graphs)
        for layer in engine.module.modules()
        if hasattr(layer, "forward") and hasattr(layer.forward, "_graphs")
    ]
    stop_world()
    return found, graphs


def config_of(stage, precision, *, llama=False, ranks=2):
    config = pico_config(zero_stage=stage, precision=precision, num_layers=4, llama=llama)
    parallel = dataclasses.replace(config.parallel, global_batch=6 * ranks, micro_batch=2)
    return dataclasses.replace(config, parallel=parallel)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of each family, by whether it is Llama's."""
    folders = {llama: tmp_path_factory.mktemp("base") for llama in (False, True)}
    for llama, folder in folders.items():
        run_ranks(train_and_save, 2, pico_config(zero_stage=1, llama=llama), folder)
    return {llama: folder / "step3" for llama, folder in folders.items()}


@pytest.mark.parametrize(
    ("stage", "precision", "llama"),
    [(0, "fp32", False), (1, "bf16", False), (1, "fp32", True), (2, "bf16", True)],
)
def test_replayed_layers_train_the_same(stage, precision, llama, bases):
    """Three micro-batches are accumulated in each step: no gradient may be overwritten."""
    config, base = config_of(stage, precision, llama=llama), bases[llama]
    plain = run_ranks(trained, 2, config, base, False)
    replayed = run_ranks(trained, 2, config, base, True)
    for (expected, none), (found, graphs) in zip(plain, replayed, strict=True):
        assert none == []
        assert graphs == [1] * 4  # one shape, captured once, kept across the switches
        assert found == expected


def one_more_forward():
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model
    from lag_megatron.model.cuda_graphs import capture_layers

    config = pico_config()
    start_world(tensor=1)
    model = build_model(config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    capture_layers(model, Rerun)
    tokens = torch.arange(8)[None]
    seen = []
    for rows in (1, 2, 3, 1):
        losses = model(tokens.expand(rows, 8), tokens.expand(rows, 8), None,
                       labels=tokens.expand(rows, 8))  # fmt: skip
        losses.sum().backward()
        seen.append(len(model.decoder.layers[0].forward._graphs))
    layer, hidden = model.decoder.layers[0], torch.randn(8, 1, 16)
    first, _ = layer(hidden_states=hidden, attention_mask=None)
    layer(hidden_states=hidden, attention_mask=None)
    with pytest.raises(AssertionError, match="another forward pass"):
        first.sum().backward()
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    weight.data = weight.data.clone()
    model(tokens, tokens, None, labels=tokens)
    graphs = model.decoder.layers[0].forward._graphs
    stop_world()
    return seen, len(graphs)


def test_few_shapes_are_kept_and_moved_weights_are_captured_again():
    (found,) = run_ranks(one_more_forward, 1)
    assert found == ([1, 2, 2, 2], 1)


def build_on_a_cpu(config):
    from lag_megatron.distributed.world import start_world
    from lag_megatron.engine.engine import Engine

    Engine(config, start_world(tensor=1), num_layers=2, vocab_size=PICO_VOCABULARY)


def with_graphs(config, **parallel):
    changed = dataclasses.replace(config.parallel, cuda_graphs=True, **parallel)
    return dataclasses.replace(config, parallel=changed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_cpu_refuses_graphs():
    with pytest.raises(ConfigError, match=r"parallel.cuda_graphs: there is no GPU"):
        run_ranks(build_on_a_cpu, 1, with_graphs(pico_config()))


def plain_and_graphed(config, folder, llama):
    train_and_save(pico_config(zero_stage=1, llama=llama), folder)
    base = folder / "step3"
    graphed = with_graphs(config) if torch.cuda.is_available() else config
    return trained(config, base, False), trained(graphed, base, True)


@pytest.mark.parametrize(
    ("stage", "precision", "llama"),
    [
        pytest.param(1, "fp32", False, id="rerun"),
        pytest.param(1, "bf16", False, marks=pytest.mark.gpu),
        pytest.param(2, "bf16", True, marks=pytest.mark.gpu),
        pytest.param(0, "fp32", True, marks=pytest.mark.gpu),
    ],
)
def test_one_rank_alone(stage, precision, llama, tmp_path):
    """On a GPU by its graphs: without and with, across two switches of candidates, bit for bit."""
    config = config_of(stage, precision, llama=llama, ranks=1)
    (expected, none), (found, graphs) = run_alone(plain_and_graphed, config, tmp_path, llama)
    assert (none, graphs) == ([], [1] * 4)
    assert found == expected
