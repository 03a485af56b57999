"""Random Path Training against a reference that trains a model of a step's layers alone.

The reference shares no code with the product's paths: it copies the layers that run into a smaller
model, whose branches' last matrices it scales, and brings the gradients back.
"""

import dataclasses
import math

import pytest
import torch
from conftest import PICO_VOCABULARY, random_batches, run_ranks, sparing
from families import family_batches, family_config
from full_state import read_full

from lag_megatron.checkpoint.megatron.param_names import LAYER
from lag_megatron.config.schema.raptr import RaptrConfig
from lag_megatron.planning.random_paths import path_at

LAYERS, STEPS, LR = 5, 5, 1e-2
# Where these end, a branch ends.
BRANCH_ENDS = (".self_attention.linear_proj", ".mlp.linear_fc2")


def raptr_config(family, *, length=3, update="decay", scale="sqrt", parallel=None, optimizer=None):
    config = family_config(family, num_layers=LAYERS, parallel=parallel)
    stage = dataclasses.replace(config.stages[0], path_length=length)
    changed = dataclasses.replace(config.optimizer, **({"grad_clip": 0.5} | (optimizer or {})))
    raptr = RaptrConfig(update_skipped=update, scale=scale)
    return dataclasses.replace(config, stages=(stage,), raptr=raptr, optimizer=changed)


def batches_of(config, world, step):
    """The same text whatever the world: prefixes would go by a rank's own rows."""
    of = family_batches if config.model.family == "bert" else random_batches
    return of(config, world, step)


def engine_of(config, world):
    from lag_megatron.engine.engine import Engine

    return Engine(config, world, num_layers=LAYERS, vocab_size=PICO_VOCABULARY)


def trained(config, folder):
    """On each rank: losses and norms of some steps and a validation loss; the state is saved."""
    from lag_megatron.distributed.world import start_world, stop_world

    world = start_world(tensor=config.parallel.tensor)
    engine, curve = engine_of(config, world), []
    for step in range(STEPS):
        batches = batches_of(config, world, step)
        result = engine.train_step(batches, step=step, lr=LR, path=path_at(step, config))
        curve.append((result.loss, result.grad_norm))
    after = engine.evaluate([batches_of(config, world, 9)])
    engine.save(folder, "state", client_state={})
    stop_world()
    return curve, after


def reference(config):
    """The same on one rank, without DeepSpeed; also the state, by kind and name."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import labels_of, loss_sums, mean_loss
    from lag_megatron.model.parameter_groups import split_by_decay

    world = start_world(tensor=1)
    whole = engine_of(config, world).module
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay}
            for group, decay in zip(
                split_by_decay(whole), (config.optimizer.weight_decay, 0.0), strict=True
            )
        ],
        lr=LR,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    curve = []
    for step in range(STEPS):
        batches = batches_of(config, world, step)
        counts = labels_of(batches)
        path = path_at(step, config)
        sums = gradients_of(whole, config, path, batches, counts)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in whole.parameters()))
        for parameter in whole.parameters():
            parameter.grad *= min(1.0, config.optimizer.grad_clip / (norm + 1e-6))
        step_of(optimizer, whole, config, path)
        curve.append((mean_loss(sums.tolist(), counts), norm))
    whole.eval()
    with torch.no_grad():
        batches = batches_of(config, world, 9)
        sums = sum(loss_sums(whole, batch).double() for batch in batches)
    state = {}
    for name, parameter in whole.named_parameters():
        held = optimizer.state[parameter]
        state["fp32", name] = parameter.detach().clone()
        state |= {(kind, name): held[kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
    after = [mean_loss(sums.tolist(), labels_of(batches))]
    stop_world()
    return curve, after, state


def gradients_of(whole, config, path, batches, counts):
    """Sums of the losses; gradients lie at the whole model's parameters, 0 where nothing ran."""
    from lag_megatron.model import build_model, loss_sums

    layers = range(LAYERS) if path is None else path.layers
    scale = 1.0 if path is None else path.branch_scale
    small = build_model(
        config.model, config.parallel, num_layers=len(layers), vocab_size=PICO_VOCABULARY
    )
    small.train()
    parameters = dict(whole.named_parameters())

    def origin(name):
        match = LAYER.match(name)
        if match is None:
            return parameters[name], 1.0
        source = f"{match['head']}{layers[int(match['layer'])]}{match['tail']}"
        return parameters[source], scale if any(e in name for e in BRANCH_ENDS) else 1.0

    with torch.no_grad():
        for name, parameter in small.named_parameters():
            source, factor = origin(name)
            parameter.copy_(source * factor)
    totals = torch.zeros(len(counts), dtype=torch.float64)
    for batch in batches:
        sums = loss_sums(small, batch)
        (sums / torch.tensor(counts).clamp(min=1.0)).sum().backward()
        totals += sums.detach()
    for parameter in whole.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for name, parameter in small.named_parameters():
        source, factor = origin(name)
        source.grad += parameter.grad * factor
    return totals


def step_of(optimizer, whole, config, path):
    """A step of all parameters, which those that stand still are then put back from."""
    frozen = []
    if path is not None and config.raptr.update_skipped == "freeze":
        for name, parameter in whole.named_parameters():
            match = LAYER.match(name)
            if match and int(match["layer"]) in path.skipped:
                frozen.append(
                    (parameter, parameter.detach().clone(), dict(optimizer.state[parameter]))
                )
    copies = [{k: v.clone() for k, v in state.items() if k != "step"} for *_, state in frozen]
    optimizer.step()
    for (parameter, value, _), moments in zip(frozen, copies, strict=True):
        with torch.no_grad():
            parameter.copy_(value)
            for kind in ("exp_avg", "exp_avg_sq"):
                held = optimizer.state[parameter][kind]
                held.copy_(moments[kind]) if kind in moments else held.zero_()


@pytest.fixture(scope="module")
def references():
    known = {}

    def run(config):
        key = (config.model, config.raptr, config.stages)
        if key not in known:
            parallel = dataclasses.replace(
                config.parallel, tensor=1, zero_stage=0, precision="fp32", recompute="none",
                sequence_parallel=False,
            )  # fmt: skip
            known[key] = run_ranks(reference, 1, dataclasses.replace(config, parallel=parallel))[0]
        return known[key]

    return run


WAYS = [
    ("gpt2", 0, "decay", 2, {}),
    ("gpt2", 1, "decay", 2, {}),
    ("gpt2", 1, "freeze", 2, {}),
    ("gpt2", 2, "freeze", 2, {}),
    ("gpt2", 3, "decay", 2, {}),
    ("gpt2", 3, "freeze", 4, {}),
    ("bert-post", 3, "decay", 2, {"recompute": "layers"}),
    ("bert-post", 1, "freeze", 2, {"tensor": 2, "sequence_parallel": True, "recompute": "layers"}),
    ("llama", 1, "decay", 4, {"tensor": 2}),
    ("bert-pre", 2, "decay", 2, {}),
    ("gpt2", 0, "freeze", 2, {}),
    ("gpt2", 2, "decay", 4, {"tensor": 2, "recompute": "layers"}),
    ("llama", 3, "freeze", 2, {"recompute": "layers"}),
    ("llama", 0, "freeze", 1, {}),
    ("bert-post", 0, "decay", 2, {"tensor": 2}),
    ("bert-pre", 3, "freeze", 2, {}),
]
QUICK = [WAYS[i] for i in (0, 2, 4, 7)]


@pytest.mark.parametrize(
    ("family", "stage", "update", "ranks", "parallel"), sparing(WAYS, slow=lambda w: w not in QUICK)
)
def test_every_way_trains_what_the_reference_trains(
    family, stage, update, ranks, parallel, references, tmp_path
):
    config = raptr_config(family, update=update, parallel={"zero_stage": stage, **parallel})
    compare(config, ranks, references(config), tmp_path)


def compare(config, ranks, expected, folder, *, tolerance=1e-5):
    curve, after, state = expected
    for found, validated in run_ranks(trained, ranks, config, folder):
        for (loss, norm), (its_loss, its_norm) in zip(found, curve, strict=True):
            assert loss == pytest.approx(its_loss, abs=tolerance)
            assert norm == pytest.approx(its_norm, rel=1e-4)
        assert validated == pytest.approx(after, abs=tolerance)
    tensor = config.parallel.tensor
    whole, _ = read_full(
        folder / "state",
        stage=config.parallel.zero_stage,
        data_size=ranks // tensor,
        tensor_size=tensor,
        precision="fp32",
        gated=config.model.activation == "swiglu",
    )
    for key, value in state.items():
        found = whole[key]
        if key[1].endswith("linear_qkv.bias"):
            # A key's bias has no gradient but rounding, of which Adam makes whole steps.
            groups = config.model.num_query_groups
            found, value = (without_keys(bias, groups) for bias in (found, value))
        torch.testing.assert_close(found, value, rtol=1e-3, atol=3e-5, msg=str(key))


def without_keys(bias, groups):
    """Queries' and values' part: each group has its queries, a key and a value (one head each)."""
    return bias.view(groups, 3, -1)[:, [0, 2]]


@pytest.mark.parametrize("scale", ["none", "linear"])
def test_scales(scale, references, tmp_path):
    config = raptr_config("gpt2", scale=scale)
    compare(config, 1, references(config), tmp_path)


@pytest.mark.parametrize("update", ["decay", "freeze"])
def test_deepspeeds_own_step(update, references, tmp_path):
    config = raptr_config("gpt2", update=update, optimizer={"one_pass": False})
    compare(config, 2, references(config), tmp_path)


def states_around_a_step(config):
    """Each parameter's weights and optimizer state before and after one step of a path."""
    from lag_megatron.distributed.world import start_world, stop_world

    world = start_world(tensor=1)
    engine = engine_of(config, world)

    def states():
        held = engine.state.torch_optimizer.state
        return {
            name: [parameter.detach().clone()]
            + [value.clone() for key, value in sorted(held[parameter].items()) if key != "step"]
            for name, parameter in engine.module.named_parameters()
        }

    engine.train_step(batches_of(config, world, 0), step=0, lr=LR)
    before = states()
    path = path_at(1, config)
    engine.train_step(batches_of(config, world, 1), step=1, lr=LR, path=path)
    after = states()
    stop_world()
    return path, before, after


def test_adafactors_statistics_stand_still_too():
    optimizer = {"name": "adafactor", "grad_clip": 0.0}
    config = raptr_config("gpt2", update="freeze", optimizer=optimizer, parallel={"zero_stage": 0})
    ((path, before, after),) = run_ranks(states_around_a_step, 1, config)
    assert path.skipped
    for name, values in before.items():
        match = LAYER.match(name)
        same = [torch.equal(a, b) for a, b in zip(values, after[name], strict=True)]
        assert len(same) >= 2
        assert all(same) if match and int(match["layer"]) in path.skipped else not all(same), name
