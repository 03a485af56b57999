"""Grown shards under DeepSpeed's own loader: every stage, precision, tensor parallelism, operator.

What DeepSpeed loaded is saved again by DeepSpeed and compared, tensor by tensor and bit for bit,
with whole tensors that were read from the source's shards and grown in plain torch.
"""

import dataclasses
import math

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, sparing
from full_state import STATES, differences, grow_full, read_full, tree_differences

from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Normal, normal

DUPLICATE, RANDOM, ZEROED, BORROWED = "duplicate", "random", "zeroed", "borrowed"
# name: (operator, options, moments asked for, layers as (old, is new), moments expected)
EVENTS = {
    DUPLICATE: ("lag", {"index": 0, "block_size": 1, "init": "duplicate"}, "auto",
                [(0, False), (0, True), (1, False), (1, True)], "copy"),
    RANDOM: ("lag", {"index": 0, "block_size": 1, "init": "random"}, "auto",
             [(0, False), (0, True), (1, False), (1, True)], "borrow"),
    ZEROED: ("last", {}, "zero", [(0, False), (1, False), (0, True), (1, True)], "zero"),
    BORROWED: ("random_top", {}, "borrow",
               [(0, False), (1, False), (0, True), (1, True)], "borrow"),
}  # fmt: skip


def plan_of(event):
    operator, options, moments, _, _ = EVENTS[event]
    return GrowthPlan(
        operator=operator, options=options, source_layers=2, target_layers=4, moments=moments
    )


def fresh_weights(source, layers, init_std=0.02, seed=1234):
    """Megatron-Core's initialisation of a model of ``layers`` layers, as a function of the name."""

    def make(name, shape):
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "layernorm" in name:
            return torch.ones(shape)
        into_residual = "linear_proj" in name or "linear_fc2" in name
        std = init_std / math.sqrt(2 * layers) if into_residual else init_std
        key = f"growth/{seed}/{source}-{layers}/{name}"
        return torch.from_numpy(normal(Normal(std, key), 0, math.prod(shape))).view(shape)

    return make


def grow_and_load(config, folder, plans, target_layers, steps=3):
    """On each rank: train, save, grow by each plan, load by DeepSpeed, save again, go on.

    Returns the losses of two steps after each growth, and each loaded model's weights.
    """
    import deepspeed

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)

    def train(engine, first, last):
        return [
            engine.train_step(random_batches(config, world, step), step=step, lr=1e-2).loss
            for step in range(first, last)
        ]

    source = Engine(config, world, num_layers=config.model.num_layers, vocab_size=PICO_VOCABULARY)
    train(source, 0, 3)
    source.save(folder, "source", client_state={"step": 3})
    world.barrier()
    if world.is_coordinator:
        for name, plan in plans.items():
            grow_checkpoint(folder / "source", folder / name / "grown", plan)
    world.barrier()
    engine = Engine(config, world, num_layers=target_layers, vocab_size=PICO_VOCABULARY)
    losses, weights = {}, {}
    for name in plans:
        path, state = engine.deepspeed_engine.load_checkpoint(str(folder / name))
        assert path is not None
        assert state["lag"]["num_layers"] == target_layers
        engine.save(folder / name, "again", client_state={})
        parameters = dict(engine.module.named_parameters())
        gathered = list(parameters.values()) if config.parallel.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
            weights[name] = {n: p.detach().float().clone() for n, p in parameters.items()}
        losses[name] = train(engine, 3, 3 + steps)
    stop_world()
    return losses, weights


@dataclasses.dataclass(frozen=True)
class Case:
    stage: int
    precision: str = "fp32"
    tensor: int = 1
    llama: bool = False

    def __str__(self):
        return f"zero{self.stage}-{self.precision}-tp{self.tensor}{'-llama' * self.llama}"

    @property
    def topology(self):
        return {
            "stage": self.stage,
            "data_size": 2 // self.tensor,
            "tensor_size": self.tensor,
            "precision": self.precision,
            "gated": self.llama,
        }


CASES = (
    *(Case(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)),
    *(Case(stage, tensor=2) for stage in range(4)),
    *(Case(stage, llama=True) for stage in (1, 3)),
    *(Case(stage, tensor=2, llama=True) for stage in (0, 1, 2)),
    Case(1, "bf16", tensor=2, llama=True),
)


def is_spared(case):
    """What lays out as others that stay: each way beside the plain case is there once."""
    plain = case.precision == "fp32" and case.tensor == 1 and not case.llama
    way = (case.stage, case.precision, case.tensor, case.llama)
    return not plain and way not in ((1, "fp32", 2, True), (3, "bf16", 1, False))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Folder, losses and weights of each case, run once where first asked for."""
    known = {}

    def outcome(case):
        if case not in known:
            folder = tmp_path_factory.mktemp(str(case))
            config = pico_config(
                zero_stage=case.stage,
                precision=case.precision,
                tensor=case.tensor,
                llama=case.llama,
            )
            plans = {event: plan_of(event) for event in EVENTS}
            results = run_ranks(grow_and_load, 2, config, folder, plans, 4)
            known[case] = (folder, *results[0])
        return known[case]

    return outcome


@pytest.mark.parametrize("case", sparing(CASES, slow=is_spared), ids=str)
def test_deepspeed_loads_what_was_grown(case, outcomes):
    folder, _, weights = outcomes(case)
    source, steps = read_full(folder / "source", **case.topology)
    assert steps == {3.0}
    for event, (_, options, _, layers, moments) in EVENTS.items():
        is_random = event == BORROWED or options.get("init") == "random"
        fresh = fresh_weights(2, 4) if is_random else None
        expected = grow_full(source, layers, moments=moments, fresh=fresh)
        for tag in ("grown", "again"):
            found, steps = read_full(folder / event / tag, **case.topology)
            assert steps == {3.0}
            assert differences(found, expected) == [], (event, tag)
        if case.tensor == 1:
            dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
            for name, weight in weights[event].items():
                assert torch.equal(weight, expected["fp32", name].to(dtype).float()), name


@pytest.mark.parametrize("case", sparing(CASES, slow=is_spared), ids=str)
def test_saving_after_loading_gives_the_files_that_were_written(case, outcomes):
    folder, _, _ = outcomes(case)
    for event in EVENTS:
        written = sorted((folder / event / "grown").glob("*.pt"))
        assert written
        for file in written:
            again = torch.load(folder / event / "again" / file.name, weights_only=False)
            found = tree_differences(torch.load(file, weights_only=False), again)
            assert [d for d in found if not d.startswith("/lag/")] == [], file.name


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize(
    ("one", "other"),
    sparing(
        [
            *((Case(0), Case(stage)) for stage in (1, 2, 3)),
            *((Case(0), Case(stage, tensor=2)) for stage in range(4)),
            (Case(1, llama=True), Case(3, llama=True)),
            *((Case(1, llama=True), Case(stage, tensor=2, llama=True)) for stage in (0, 1, 2)),
        ],
        slow=lambda pair: any(map(is_spared, pair)),
    ),
    ids=str,
)
def test_training_goes_on_alike(one, other, event, outcomes):
    losses = [outcomes(case)[1][event] for case in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_events_differ(outcomes):
    losses = outcomes(Case(1))[1]
    assert len({tuple(found) for found in losses.values()}) == len(EVENTS)


PAPER = {
    f"i{index}-b{block}-{init}": {"index": index, "block_size": block, "init": init}
    for index in (0, 2, 4, 6, 8)
    for block in (1, 2, 4)
    for init in ("duplicate", "random")
}


def lag_layers(index, block_size, count=12, new=4):
    """The definition in words: after each block of the set comes its new block."""
    layers = [(i, False) for i in range(index)]
    for first in range(index, index + new, block_size):
        block = range(first, first + block_size)
        layers += [(i, False) for i in block] + [(i, True) for i in block]
    return layers + [(i, False) for i in range(index + new, count)]


def test_all_operators_of_the_paper_from_12_to_16_layers(tmp_path):
    config = pico_config(num_layers=12)
    plans = {
        name: GrowthPlan(operator="lag", options=options, source_layers=12, target_layers=16)
        for name, options in PAPER.items()
    }
    assert len(plans) == 30
    run_ranks(grow_and_load, 2, config, tmp_path, plans, 16, 0, timeout=200)
    topology = Case(1).topology
    source, _ = read_full(tmp_path / "source", **topology)
    assert all(source[state, "decoder.layers.11.mlp.linear_fc1.weight"].any() for state in STATES)
    for name, options in PAPER.items():
        layers = lag_layers(options["index"], options["block_size"])
        is_random = options["init"] == "random"
        expected = grow_full(
            source,
            layers,
            moments="borrow" if is_random else "copy",
            fresh=fresh_weights(12, 16) if is_random else None,
        )
        for tag in ("grown", "again"):
            found, steps = read_full(tmp_path / name / tag, **topology)
            assert steps == {3.0}
            assert differences(found, expected) == [], (name, tag)
