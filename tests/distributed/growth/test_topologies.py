"""A training state of any topology becomes one of any other, grown or not, and DeepSpeed takes it.

What is written is compared, bit for bit, with whole tensors that an independent reader takes from
the source's shards; then DeepSpeed loads it on the new number of ranks and saves it again.
"""

import dataclasses
from dataclasses import replace

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, train_and_save
from full_state import differences, grow_full, read_full, tree_differences

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import retarget
from lag_megatron.growth.plan import GrowthPlan

LAYERS = [(0, False), (0, True), (1, False), (1, True)]
GROW = GrowthPlan(
    operator="lag",
    options={"index": 0, "block_size": 1, "init": "duplicate"},
    source_layers=2,
    target_layers=4,
)
KEEP = GrowthPlan(operator="identity", source_layers=2, target_layers=2)


@dataclasses.dataclass(frozen=True)
class At:
    """ZeRO stage, all ranks, tensor-parallel ranks, precision."""

    stage: int
    world: int
    tensor: int = 1
    precision: str = "fp32"

    def __str__(self):
        return f"zero{self.stage}x{self.world}tp{self.tensor}{self.precision}"

    def config(self, **model):
        config = pico_config(
            zero_stage=self.stage, tensor=self.tensor, precision=self.precision, **model
        )
        # 12 sequences, so that 1, 2, 3, 4 and 6 replicas can share them.
        return replace(config, parallel=replace(config.parallel, global_batch=12))

    def topology(self, source):
        return retarget(
            source,
            world_size=self.world,
            tensor_size=self.tensor,
            zero_stage=self.stage,
            precision=self.precision,
        )

    def read(self, folder, **shape):
        return read_full(
            folder,
            stage=self.stage,
            data_size=self.world // self.tensor,
            tensor_size=self.tensor,
            precision=self.precision,
            **shape,
        )


# Every stage and number of ranks on both sides; the rest of the matrix is slow.
WAYS = [
    (At(0, 2), At(3, 3)),
    (At(1, 3), At(1, 2)),
    (At(1, 4, 2), At(2, 4, 4)),
    (At(1, 4, 2), At(3, 3)),
    (At(2, 4), At(0, 1)),
    (At(3, 2), At(1, 6, 2)),
    (At(3, 2), At(2, 3, precision="bf16")),
    (At(3, 2, precision="bf16"), At(0, 2, precision="bf16")),
]
MORE_WAYS = [
    (At(0, 1), At(1, 6, 2)),
    (At(1, 2), At(1, 6)),
    (At(1, 6, 2), At(0, 2)),
    (At(2, 4), At(3, 6, 2)),
    (At(2, 3), At(0, 1)),
    (At(3, 2), At(1, 3)),
    (At(3, 3), At(3, 4)),
    (At(3, 4, 2), At(2, 3)),
    (At(3, 1), At(3, 2)),
    (At(1, 2, precision="bf16"), At(3, 3, precision="bf16")),
    (At(1, 2), At(2, 3, precision="bf16")),
    (At(3, 2, precision="bf16"), At(1, 2)),
    (At(0, 2, precision="bf16"), At(1, 1)),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of each source topology and model, made where first asked for."""
    known = {}

    def source(at, **model):
        key = (at, *model.items())
        if key not in known:
            folder = tmp_path_factory.mktemp(str(at))
            run_ranks(train_and_save, at.world, at.config(**model), folder)
            known[key] = folder / "step3"
        return known[key]

    return source


def load_and_save(config, folder, layers, steps):
    """On each rank: load what was grown, save it again, train on; the losses."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    engine = Engine(
        config, world, num_layers=layers, vocab_size=PICO_VOCABULARY, draw_weights=False
    )
    engine.load(folder / "grown")
    engine.save(folder, "again", client_state={})
    losses = [
        engine.train_step(random_batches(config, world, step), step=step, lr=1e-2)
        for step in range(3, 3 + steps)
    ]
    stop_world()
    return [step.loss for step in losses]


def grow_to(source, target, folder, plan=GROW, **options):
    topology = target.topology(ZeroCheckpoint.open(source).topology)
    grow_checkpoint(source, folder / "grown", plan, topology=topology, **options)


def in_precision(state, precision):
    """Forward weights follow the masters, rounded."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return {
        key: state["fp32", key[1]].to(dtype) if key[0] == "weight" else value
        for key, value in state.items()
    } | {("weight", n): v.to(dtype) for (kind, n), v in state.items() if kind == "fp32"}


def check(source, before, target, folder, layers, **shape):
    state, steps = before.read(source, **shape)
    assert steps == {3.0}
    expected = in_precision(grow_full(state, layers), target.precision)
    for tag in ("grown", "again"):
        found, steps = target.read(folder / tag, **shape)
        if target.stage == 3:  # ZeRO-3 keeps no weights beside the masters
            found |= {k: v for k, v in expected.items() if k[0] == "weight"}
        assert steps == {3.0}
        assert differences(found, expected) == [], tag
    for file in sorted((folder / "grown").glob("*.pt")):
        again = torch.load(folder / "again" / file.name, weights_only=False)
        found = tree_differences(torch.load(file, weights_only=False), again)
        own = ("/lag/", "/ds_config", "/global_samples")  # the new run's own configuration
        assert [d for d in found if not d.startswith(own)] == [], file.name


# Grouped queries, a gate beside fc1's rows, no biases, an output layer of its own.
LLAMA_WAYS = [(At(1, 2, 2), At(3, 3)), (At(3, 2), At(1, 4, 2))]
FIRST_LOSSES: dict = {}
CASES = [
    *((GROW, *way, False) for way in WAYS),
    *((KEEP, *way, False) for way in WAYS[1:3]),
    *((GROW, *way, True) for way in LLAMA_WAYS),
    *(
        pytest.param(plan, *way, False, marks=pytest.mark.slow)
        for plan in (GROW, KEEP)
        for way in MORE_WAYS
    ),
    pytest.param(GROW, At(0, 2, 2), At(2, 1), True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("plan", "before", "after", "llama"), CASES, ids=lambda v: getattr(v, "operator", str(v))
)
def test_deepspeed_takes_it_on_other_ranks(plan, before, after, llama, sources, tmp_path):
    source = sources(before, llama=llama)
    layers = LAYERS if plan is GROW else [(0, False), (1, False)]
    grow_to(source, after, tmp_path, plan)
    config = after.config(llama=llama, num_layers=len(layers))
    losses = run_ranks(load_and_save, after.world, config, tmp_path, len(layers), 1)
    assert len({tuple(rank) for rank in losses}) == 1
    key = (plan.operator, llama, after.precision)
    # Every way comes from the same training and goes on with the same batch.
    tolerance = 1e-5 if before.precision == after.precision == "fp32" else 2e-2
    assert losses[0] == pytest.approx(FIRST_LOSSES.setdefault(key, losses[0]), abs=tolerance)
    check(source, before, after, tmp_path, layers, gated=llama)


def train_unsharded(config, state, steps):
    """Without DeepSpeed, one process: the losses of a model that begins at these whole tensors.

    Twice: the second time without the moments.
    """
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model, labels_of, loss_sums

    world, losses = start_world(tensor=1), []
    model = build_model(
        config.model,
        config.parallel,
        num_layers=config.model.num_layers,
        vocab_size=PICO_VOCABULARY,
    )
    parameters = dict(model.named_parameters())
    assert {("fp32", name) for name in parameters} == {key for key in state if key[0] == "fp32"}
    for keep in (1.0, 0.0):
        groups = [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        for name, parameter in parameters.items():
            parameter.data.copy_(state["fp32", name])
            moments = {m: state[m, name] * keep for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
        for step in steps:
            optimizer.zero_grad()
            batches = random_batches(config, world, step)
            (labels,) = labels_of(batches)
            parts = [loss_sums(model, batch).sum() / labels for batch in batches]
            for loss in parts:
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            losses.append(float(sum(loss.detach() for loss in parts)))
    stop_world()
    return losses


def test_twelve_layers_go_on_as_sixteen_like_an_unsharded_model(sources, tmp_path):
    before, after = At(1, 4, 2), At(3, 3)
    options = {"index": 4, "block_size": 2, "init": "duplicate"}
    plan = GrowthPlan(operator="lag", options=options, source_layers=12, target_layers=16)
    layers = [(old, False) for old in range(6)] + [(4, True), (5, True), (6, False), (7, False)]
    layers += [(6, True), (7, True)] + [(old, False) for old in range(8, 12)]
    source = sources(before, num_layers=12)
    grow_to(source, after, tmp_path, plan)
    config = after.config(num_layers=16)
    losses = run_ranks(load_and_save, after.world, config, tmp_path, 16, 4)
    check(source, before, after, tmp_path, layers)
    state, _ = before.read(source)
    whole = grow_full(state, layers)
    (expected,) = run_ranks(train_unsharded, 1, config, whole, range(3, 7))
    for found in losses:
        assert found == pytest.approx(expected[:4], abs=1e-5)
        assert found != pytest.approx(expected[4:], abs=1e-3)  # the moments were needed
