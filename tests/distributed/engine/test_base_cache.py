"""A switch from the cached base equals one from its shards, bit for bit."""

import pytest
import torch
from conftest import run_alone, run_ranks, sparing, train_and_save
from switching import PAGE, PLANS, config_of, same_files, save_base, small_cache, switch_from_cache

from lag_megatron.growth.plan import GrowthPlan

base = pytest.fixture(save_base, scope="module")
QUICK = [(0, "bf16", 1), (3, "bf16", 1), (2, "fp32", 1), (1, "bf16", 2)]
CASES = [
    *((stage, precision, 1) for stage in range(4) for precision in ("fp32", "bf16")),
    *((stage, precision, 2) for stage in (0, 1, 3) for precision in ("fp32", "bf16")),
]


@pytest.mark.parametrize(
    ("stage", "precision", "tensor"), sparing(CASES, slow=lambda at: at not in QUICK)
)
def test_the_cache_equals_shards(stage, precision, tensor, base, tmp_path):
    config = config_of(stage, precision, tensor, layers=4)
    results = run_ranks(switch_from_cache, 2, config, base, tmp_path, PLANS)
    for losses in results:
        for name, (there, here) in losses.items():
            assert there == here, name
    for name in PLANS:
        assert same_files(tmp_path / f"{name}-shards", tmp_path / f"{name}-cached") > 0


def train_and_switch(config, folder):
    train_and_save(config_of(1, "fp32", 1, weight_decay=0.3), folder)
    return switch_from_cache(config, folder / "step3", folder, PLANS)


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (3, "fp32")])
def test_a_gpu_caches_its_base(stage, precision, tmp_path):
    """In device memory, by the kernel: masters, moments, weights and the losses that follow."""
    losses = run_alone(train_and_switch, config_of(stage, precision, 1, layers=4), tmp_path)
    for name, (there, here) in losses.items():
        assert there == here, name
        assert same_files(tmp_path / f"{name}-shards", tmp_path / f"{name}-cached") > 0


def test_a_base_that_does_not_fit_is_read_from_its_shards(base, capsys):
    """It is said once; what else would have to be read stays unread."""
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.growth.apply.grown_state import GrownState

    growth = GrownState(ZeroCheckpoint.open(base), PLANS["duplicate"])
    cache, targets = small_cache(limit=4), targets_of(growth)
    found = [cache.runs(growth, growth.filler(tensor_rank=0), targets) for _ in range(4)]
    assert found == [None] * 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "MiB more, and there are 0 MiB of memory" in line


def test_tiers_are_taken_in_their_order(base, capsys):
    """The second where the first has no memory left."""
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.engine.base_cache import BaseCache, MemoryTier
    from lag_megatron.growth.apply.grown_state import GrownState

    taken = []

    def tier(name, free):
        return MemoryTier(
            name, lambda: free, lambda n: (taken.append((name, n)), torch.empty(n))[1]
        )

    growth = GrownState(ZeroCheckpoint.open(base), PLANS["duplicate"])
    cache = BaseCache([tier("device", 100), tier("host", 1e9)], page=PAGE, verbose=True)
    fill, targets = growth.filler(tensor_rank=0), targets_of(growth)
    assert cache.runs(growth, fill, targets) is None
    assert cache.runs(growth, fill, targets)
    ((name, elements),) = taken
    assert name == "host"
    # Every old value once, and little beside: pages end where their buffers do.
    old = 3 * sum(growth.source.layout.filled.values())
    assert elements <= 1.05 * old
    assert cache.runs(growth, fill, targets)  # nothing more is read
    assert len(taken) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("MiB of this event's base are kept in host.")


def test_copies_of_too_many_pieces_are_left_to_the_shards(base, capsys, monkeypatch):
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.engine import base_cache
    from lag_megatron.growth.apply.grown_state import GrownState

    monkeypatch.setattr(base_cache, "MAX_RUNS", 5)
    growth, cache = GrownState(ZeroCheckpoint.open(base), PLANS["duplicate"]), small_cache()
    fill, targets = growth.filler(tensor_rank=0), targets_of(growth)
    assert [cache.runs(growth, fill, targets) for _ in range(3)] == [None] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs, more than 5" in line


def test_a_new_base_takes_the_place_of_the_old(base, tmp_path):
    """Nothing of another checkpoint is ever written."""
    import shutil

    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.growth.apply.grown_state import GrownState

    other, cache = tmp_path / "other", small_cache()
    shutil.copytree(base, other)
    from_shards = []
    for path in (base, base, other, other, base):
        growth = GrownState(ZeroCheckpoint.open(path), PLANS["duplicate"])
        found = cache.runs(growth, growth.filler(tensor_rank=0), targets_of(growth))
        from_shards.append(found is None)
    assert from_shards == [True, False, True, False, True]


def test_on_a_cpu_nothing_is_cached():
    from lag_megatron.engine.base_cache import BaseCache

    assert BaseCache.for_device(torch.device("cpu"), local_ranks=1) is None


def targets_of(growth):
    """Buffers of data rank 0, full of something else."""
    from lag_megatron.checkpoint.state.region import Region
    from lag_megatron.engine.base_cache import Target

    targets = []
    for state, layout in growth.layout.states.items():
        for container, held in layout.buffers_of_rank(0).items():
            length = layout.lengths[container]
            region = Region(state, held, length)
            weights = torch.full((length,), 3.0, dtype=torch.bfloat16) if state == "fp32" else None
            targets.append(Target(region, torch.full((length,), 5.0), weights))
    return targets


OPERATORS = {
    **PLANS,
    "staged": GrowthPlan(
        operator="staged", options={"query_groups": 2}, source_layers=2, target_layers=4
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("stage", "tensor"), [(1, 1), (3, 1), (2, 2), (0, 2)])
def test_every_region_is_what_shards_give(name, stage, tensor, base):
    """Also from one tensor-parallel size to another, whose copies are strided."""
    from lag_megatron.checkpoint.state.layout import Topology
    from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
    from lag_megatron.growth.apply.grown_state import GrownState
    from lag_megatron.kernels.grow import write_runs_by_torch

    topology = Topology(zero_stage=stage, data_size=2, tensor_size=tensor, precision="bf16")
    cache = small_cache()
    for rank in range(tensor):
        growth = GrownState(ZeroCheckpoint.open(base), OPERATORS[name], topology)
        fill = growth.filler(tensor_rank=rank)
        cache.runs(growth, fill, targets_of(growth))
        targets = targets_of(growth)
        write_runs_by_torch(cache.runs(growth, fill, targets))
        for target in targets:
            expected = torch.full_like(target.values, 6.0)
            fill(target.region, expected)
            assert torch.equal(target.values, expected)
            if target.weights is not None:
                assert torch.equal(target.weights, expected.to(torch.bfloat16))
