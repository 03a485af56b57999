"""Growing shards equals growing whole tensors and sharding the result, bit for bit."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lag_megatron.checkpoint.state.box import full_box
from lag_megatron.checkpoint.state.layout import STATES, Topology, make_layout
from lag_megatron.checkpoint.state.tensor_parallel import local_shape
from lag_megatron.growth.apply.copy_plan import Move, ShardedModel, plan_rank
from lag_megatron.growth.growth_map import Copy, ParamBlock, depth_map, identity_map
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.growth.weight_init import Constant, Normal, fill

# The test's own table of what tensor parallelism cuts.
COLUMNS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight",
           "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")  # fmt: skip
ROWS = ("linear_proj.weight", "linear_fc2.weight")
FIRST_NAMES = ["embedding.word_embeddings.weight", "embedding.position_embeddings.weight"]


def model_groups(layers, *, hidden, ffn, gated, bias, tied):
    """Whole shapes: matrices, then vectors, each in the order of registration."""
    matrices = {FIRST_NAMES[0]: (8, hidden), FIRST_NAMES[1]: (3, hidden)}
    vectors = {}
    for layer in range(layers):
        at = f"decoder.layers.{layer}."
        vectors[at + "input_layernorm.weight"] = (hidden,)
        matrices[at + "self_attention.linear_proj.weight"] = (hidden, hidden)
        matrices[at + "self_attention.linear_qkv.weight"] = (3 * hidden, hidden)
        matrices[at + "mlp.linear_fc1.weight"] = (ffn * (2 if gated else 1), hidden)
        matrices[at + "mlp.linear_fc2.weight"] = (hidden, ffn)
        if bias:
            vectors[at + "self_attention.linear_proj.bias"] = (hidden,)
            vectors[at + "self_attention.linear_qkv.bias"] = (3 * hidden,)
            vectors[at + "mlp.linear_fc1.bias"] = (ffn * (2 if gated else 1),)
    vectors["decoder.final_layernorm.weight"] = (hidden,)
    if not tied:
        matrices["output_layer.weight"] = (8, hidden)
    return [matrices, vectors]


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    ffn: int
    gated: bool
    bias: bool
    tied: bool

    @property
    def groups(self):
        return model_groups(self.layers, **{k: v for k, v in dataclasses.asdict(self).items()
                                            if k != "layers"})  # fmt: skip


SHAPES = st.builds(
    Shape,
    layers=st.integers(1, 4),
    hidden=st.sampled_from([4, 8]),
    ffn=st.sampled_from([4, 8, 12]),
    gated=st.booleans(),
    bias=st.booleans(),
    tied=st.booleans(),
)
TOPOLOGIES = st.builds(
    Topology,
    zero_stage=st.sampled_from([0, 1, 3]),
    data_size=st.integers(1, 6),
    tensor_size=st.sampled_from([1, 2, 4]),
    precision=st.just("fp32"),
    sub_group_size=st.sampled_from([20, 10**9]),
)


def cut(name, tensor, rank, size, gated):
    """One tensor rank's part of a whole parameter, by plain slicing."""
    if name.endswith(ROWS):
        return tensor.chunk(size, 1)[rank]
    if not name.endswith(COLUMNS):
        return tensor
    halves = tensor.chunk(2, 0) if gated and "linear_fc1" in name else (tensor,)
    return torch.cat([half.chunk(size, 0)[rank] for half in halves])


def shard(groups, tensors, topology, gated, rank):
    """Buffers by (data rank, number) of one tensor rank, by plain concatenation; NaN pads."""
    nan = float("nan")
    size = topology.data_size
    flat = [
        [
            cut(n, tensors[n], rank, topology.tensor_size, gated).flatten().contiguous()
            for n in group
        ]
        for group in groups
    ]
    if topology.zero_stage == 0:
        return {(0, k): t for k, t in enumerate(t for group in flat for t in group)}
    if topology.zero_stage == 3:
        buffers, held = [[[]] for _ in range(size)], 0
        for group in flat:
            for number, tensor in enumerate(group):
                if held >= topology.sub_group_size or (number == 0 and buffers[0][-1]):
                    held = 0
                    for parts in buffers:
                        parts.append([])
                part = -(-len(tensor) // size)
                padded = torch.cat([tensor, torch.full((part * size - len(tensor),), nan)])
                for parts, piece in zip(buffers, padded.split(part), strict=True):
                    parts[-1].append(piece)
                held += part
        return {(r, k): torch.cat(b) for r, parts in enumerate(buffers)
                for k, b in enumerate(parts)}  # fmt: skip
    buffers = {}
    for key, group in enumerate(flat):
        joined = torch.cat(group)
        padded = torch.cat([joined, torch.full((-len(joined) % (2 * size),), nan)])
        buffers |= {(r, key): part for r, part in enumerate(padded.chunk(size))}
    return buffers


def side(groups, topology, gated):
    local = [
        {n: local_shape(n, s, tensor_size=topology.tensor_size) for n, s in group.items()}
        for group in groups
    ]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    return ShardedModel(make_layout(local, topology), topology, shapes, gated)


def dense(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for group in groups for n, s in group.items()}


def view(buffer, place, shape):
    return buffer.as_strided(shape, place.strides, buffer.storage_offset() + place.offset)


def run(growth, source, target, state, sources, rank):
    """Execute the plan of one target tensor rank; (buffers, times each element was written)."""
    buffers = {c: torch.full((n,), float("nan")) for c, n in target.layout.lengths.items()}
    written = {c: torch.zeros(n) for c, n in target.layout.lengths.items()}
    for data_rank in range(target.topology.data_size):
        segments = list(target.layout.segments_of_rank(data_rank))
        plan = plan_rank(growth, source, target, state, segments=segments, tensor_rank=rank)
        for step in plan:
            assert step.target.container.data_rank == data_rank
            place = view(buffers[step.target.container], step.target, step.shape)
            view(written[step.target.container], step.target, step.shape).add_(1)
            if isinstance(step, Move):
                container = step.source.container
                buffer = sources[step.tensor_rank][container.data_rank, container.key]
                place.copy_(view(buffer, step.source, step.shape) * step.scale)
            else:
                fill(place, step.init, shape=step.full_shape, box=step.box)
    return buffers, written


def check(growth, old_groups, source_topology, target_topology, gated, expected, state, tensors):
    source = side(old_groups, source_topology, gated)
    target = side(growth.groups, target_topology, gated)
    sources = [
        shard(old_groups, tensors, source_topology, gated, rank)
        for rank in range(source_topology.tensor_size)
    ]
    for rank in range(target_topology.tensor_size):
        wanted = shard(growth.groups, expected, target_topology, gated, rank)
        got, written = run(growth, source, target, state, sources, rank)
        assert {(c.data_rank, c.key) for c in got} == set(wanted)
        for container, buffer in got.items():
            want = wanted[container.data_rank, container.key]
            assert torch.equal(buffer.view(torch.int32), want.view(torch.int32))
            assert torch.equal(written[container], (~want.isnan()).float())


@settings(max_examples=150)
@given(SHAPES, TOPOLOGIES, TOPOLOGIES, st.sampled_from(STATES))
def test_any_topology_from_any_other(shape, source, target, state):
    groups = shape.groups
    tensors = dense(groups, 0)
    check(identity_map(groups), groups, source, target, shape.gated, tensors, state, tensors)


def fresh_weights(name, plan):
    """What Megatron-Core draws for a parameter, written down a second time."""
    if name.endswith(".bias"):
        return Constant(0.0)
    if "norm" in name:
        return Constant(1.0)
    is_output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    std = 0.02 / math.sqrt(2 * plan.target_layers) if is_output else 0.02
    return Normal(std, f"growth/{plan.seed}/{plan.source_layers}-{plan.target_layers}/{name}")


def grown_tensors(groups, tensors, plan, state):
    """Dense growth, straight from the layer map."""
    grown = {}
    for group in groups:
        for name, tensor in tensors.items():
            if name in group and ".layers." not in name:
                grown[name] = tensor
    for layer, origin in enumerate(plan.layer_map):
        mark = f".layers.{origin.source}."
        for old in tensors:
            if mark not in old:
                continue
            name = old.replace(mark, f".layers.{layer}.")
            value = tensors[old]
            random = origin.is_new and origin.init == "random"
            scale = plan.options.get("scale", 1.0) if origin.is_new else 1.0
            is_output = "linear_proj" in name or "linear_fc2" in name
            borrows = random or scale == 0
            policy = {"auto": "borrow" if borrows else "copy"}.get(plan.moments, plan.moments)
            if state == "fp32" and is_output and scale == 0:
                value = torch.zeros_like(value)
            elif state == "fp32" and random:
                value = torch.empty_like(value)
                init = fresh_weights(name, plan)
                if is_output and isinstance(init, Normal):
                    init = dataclasses.replace(init, std=init.std * scale)
                fill(value, init, shape=tuple(value.shape), box=full_box(tuple(value.shape)))
            elif state == "fp32" and is_output:
                value = value * scale
            elif origin.is_new and (
                (state == "exp_avg" and policy in ("zero", "borrow"))
                or (state == "exp_avg_sq" and policy == "zero")
            ):
                value = torch.zeros_like(value)
            grown[name] = value
    return grown


@st.composite
def plans(draw, layers):
    target = draw(st.integers(layers + 1, 2 * layers))
    new = target - layers
    sizes = [n for n in range(1, new + 1) if new % n == 0]
    return GrowthPlan(
        operator="lag",
        options={
            "index": draw(st.integers(0, layers - new)),
            "block_size": draw(st.sampled_from(sizes)),
            "init": draw(st.sampled_from(["duplicate", "random"])),
            **draw(st.sampled_from([{}, {"scale": 0.3}, {"scale": 0.0}])),
        },
        source_layers=layers,
        target_layers=target,
        moments=draw(st.sampled_from(["auto", "copy", "zero", "borrow"])),
    )


@settings(max_examples=150)
@given(SHAPES, TOPOLOGIES, TOPOLOGIES, st.sampled_from(STATES), st.data())
def test_depth_growth_from_any_topology_to_any_other(shape, source, target, state, data):
    plan = data.draw(plans(shape.layers))
    groups = shape.groups
    tensors = dense(groups, 1)
    expected = grown_tensors(groups, tensors, plan, state)
    growth = depth_map(plan, groups)
    assert {n for group in growth.groups for n in group} == set(expected)
    check(growth, groups, source, target, shape.gated, expected, state, tensors)


def test_blocks_of_a_parameter_may_be_many_and_scaled():
    groups = [{"a": (4, 6)}]
    blocks = (
        ParamBlock(dataclasses.replace(full_box((2, 6))), {"fp32": Copy("a", (1, 0), 0.5)}),
        ParamBlock(dataclasses.replace(full_box((2, 3)), low=(2, 0)), {"fp32": Copy("a", (0, 2))}),
        ParamBlock(
            dataclasses.replace(full_box((2, 3)), low=(2, 3)), {"fp32": Copy("a", (2, 3), -2.0)}
        ),
    )
    growth = dataclasses.replace(identity_map(groups), blocks={"a": blocks})
    tensors = dense(groups, 2)
    old = tensors["a"]
    expected = torch.cat([old[1:3] * 0.5, torch.cat([old[:2, 2:5], old[2:, 3:] * -2.0], 1)])
    for stage in (0, 1, 3):
        for size in (1, 2, 3, 5):
            topology = Topology(zero_stage=stage, data_size=size, tensor_size=1, precision="fp32")
            check(growth, groups, topology, topology, False, {"a": expected}, "fp32", tensors)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("index", "block_size"), [(0, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_depth_growth_needs_few_moves(stage, index, block_size, tensor_size):
    groups = Shape(layers=12, hidden=8, ffn=8, gated=False, bias=True, tied=True).groups
    plan = GrowthPlan(
        operator="lag",
        options={"index": index, "block_size": block_size, "init": "duplicate"},
        source_layers=12,
        target_layers=16,
    )
    topology = Topology(zero_stage=stage, data_size=2, tensor_size=tensor_size, precision="fp32")
    growth = depth_map(plan, groups)
    source, target = side(groups, topology, False), side(growth.groups, topology, False)
    moves = 0
    for rank in range(2):
        segments = list(target.layout.segments_of_rank(rank))
        moves += len(plan_rank(growth, source, target, "fp32", segments=segments, tensor_rank=0))
    runs = 2 * (4 // block_size) + 1  # stretches of layers that stand together before and after
    assert moves <= 2 * 2 * runs + 2  # two groups, two ranks, and one cut of each group
