"""The arithmetic of simulated clusters: closed forms, bounds, what depends on what."""

from dataclasses import replace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from lag_megatron.config import ParallelConfig
from tools.bench.search import cluster_model as model
from tools.bench.search import simulate_cluster as program

FREE = model.Link(latency=0.0, bytes_per_second=float("inf"))
# A millisecond a token, and nothing else costs anything.
IDEAL = model.Machine(
    source="made up",
    computed=True,
    compute=((0, 0.0), (1000, 1.0)),
    optimizer_seconds=0.0,
    inside=FREE,
    between=FREE,
    ranks_per_host=8,
    memory=1e12,
    state_rate=float("inf"),
    save_rate=float("inf"),
    disk_rate=float("inf"),
)
SLOW = model.Link(latency=1e-3, bytes_per_second=1e9)
REAL = replace(
    IDEAL,
    compute=((100, 0.1), (1000, 1.0)),
    optimizer_seconds=0.01,
    inside=SLOW,
    between=SLOW,
    state_rate=1e9,
    save_rate=1e9,
    disk_rate=4e9,
    start_seconds=5.0,
    turn_seconds=0.1,
)


def job_of(*rungs, rows=64, parameters=1e6):
    return model.SearchJob(
        rows=rows,
        length=10,
        micro_rows=rows,
        parameters=parameters,
        evaluation_tokens=0.0,
        rungs=tuple((rung, candidates, 0) for rung, candidates in rungs),
        parallel=ParallelConfig(global_batch=rows, micro_batch=rows),
    )


def wall(machine, job, *, ranks, groups):
    return model.search_cost(machine, job, ranks=ranks, groups=groups).wall


# Closed forms


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_without_communication_groups_that_share_evenly_make_no_difference(groups):
    # 16 candidates x 5 steps x 640 tokens on 8 ranks, a millisecond a token
    found = wall(IDEAL, job_of((5, 16)), ranks=8, groups=groups)
    assert found == pytest.approx(16 * 5 * 0.640 / 8)


def test_without_communication_only_the_last_round_of_uneven_groups_costs():
    # 9 candidates in 8 groups take two rounds, of which the second has seven idle groups
    cost = model.search_cost(IDEAL, job_of((5, 9)), ranks=8, groups=8)
    assert cost.wall == pytest.approx(2 * 5 * 0.640)
    assert cost.idle == pytest.approx(1 - 9 / 16)


@pytest.mark.parametrize("machine", [IDEAL, REAL])
def test_one_candidate_is_probed_by_one_group(machine):
    assert list(model.group_counts(job_of((5, 1)), 8)) == [1]
    assert wall(machine, job_of((5, 1)), ranks=8, groups=1) < wall(
        machine, job_of((5, 1)), ranks=8, groups=2
    )


def test_halving_with_a_group_for_each_candidate_takes_the_slowest_of_each_rung():
    durations = [[3.0, 7.0, 5.0, 1.0], [2.0, 4.0], [6.0]]
    assert model.wall_seconds(durations, 4) == 7 + 4 + 6
    found = wall(IDEAL, job_of((5, 8), (10, 3), (20, 1)), ranks=8, groups=8)
    assert found == pytest.approx(20 * 0.640)


def test_an_all_reduce_on_one_host_is_a_ring():
    link = model.Link(latency=0.25, bytes_per_second=100.0)
    assert link.all_reduce(1000, 4) == pytest.approx(0.5 + 2 * 3 / 4 * 10)
    assert link.all_reduce(1000, 1) == 0


def test_between_hosts_each_rank_carries_its_part():
    machine = replace(IDEAL, between=model.Link(latency=0.0, bytes_per_second=100.0))
    assert machine.all_reduce(800, 8) == 0
    assert machine.all_reduce(800, 16) == pytest.approx(2 * 1 / 2 * (800 / 8) / 100)


def test_busy_ranks_slow_each_other_down():
    machine = replace(IDEAL, contention=((1, 1.0), (2, 1.0), (4, 2.0)))
    job = job_of((5, 4))
    assert wall(machine, job, ranks=2, groups=2) == pytest.approx(
        wall(IDEAL, job, ranks=2, groups=2)
    )
    assert wall(machine, job, ranks=4, groups=4) == pytest.approx(
        2 * wall(IDEAL, job, ranks=4, groups=4)
    )


def test_micro_batches_add_up():
    machine = replace(IDEAL, compute=((100, 0.5), (1000, 5.0)))
    job = replace(job_of((1, 1)), micro_rows=24)  # 64 rows: 24 + 24 + 16
    assert model.step_seconds(machine, job, 1, busy=1)[0] == pytest.approx(1.2 + 1.2 + 0.8)


def test_a_launch_bound_pass_does_not_get_shorter():
    assert REAL.pass_seconds(1) == REAL.pass_seconds(100) == 0.1
    assert REAL.pass_seconds(2000) == pytest.approx(2.0)


def test_a_state_that_one_rank_cannot_hold_needs_a_larger_group():
    # Under ZeRO-1 and fp32 a rank holds 8 + 12 / n bytes a parameter.
    job = job_of((5, 8), parameters=1e9)
    machine = replace(IDEAL, memory=12e9 / model.STATE_SHARE)
    assert not model.fits(machine, job, 2)
    assert model.fits(machine, job, 4)


def test_groups_cut_ranks_and_batch_evenly():
    assert list(model.group_counts(job_of((5, 30), rows=256), 240)) == [15, 30]
    assert list(model.group_counts(job_of((5, 3)), 8)) == [1, 2]


def test_thirty_candidates_on_240_gpus_gain_elevenfold_from_groups():
    """BERT-base on H200: 102 TFLOP a step at 490, 7 ms of launches; 60 s against 5.5 s."""
    h200 = replace(
        IDEAL,
        compute=((256 * 512 * 0.007 / 0.208, 0.007), (256 * 512, 0.208)),
        inside=model.Link(latency=0.25e-3, bytes_per_second=480e9),
        between=model.Link(latency=0.5e-3, bytes_per_second=50e9),
    )
    job = replace(
        job_of((200, 30), rows=240, parameters=138e6),
        length=256 * 512 / 240,
        parallel=ParallelConfig(precision="bf16"),
    )
    one, thirty = (wall(h200, job, ranks=240, groups=groups) for groups in (1, 30))
    assert one == pytest.approx(60, rel=0.1)
    assert thirty == pytest.approx(5.5, rel=0.1)


# Bounds and monotonicity

tasks = st.lists(st.floats(0.01, 100), min_size=1, max_size=30)


@given(durations=tasks, groups=st.integers(1, 12))
def test_no_schedule_beats_its_bounds_nor_leaves_a_group_idle_in_vain(durations, groups):
    found = model.makespan(durations, groups)
    lower = max(sum(durations) / groups, max(durations))
    assert found >= lower * (1 - 1e-9)
    assert found <= (2 - 1 / groups) * lower * (1 + 1e-9)  # Graham 1966


@given(
    candidates=st.integers(1, 30),
    log_groups=st.integers(0, 3),
    faster=st.floats(1, 100),
    where=st.sampled_from(["inside", "between"]),
)
def test_a_faster_wire_never_costs_time(candidates, log_groups, faster, where):
    machine = replace(REAL, ranks_per_host=4)
    link = getattr(machine, where)
    quick = replace(
        machine, **{where: replace(link, bytes_per_second=link.bytes_per_second * faster)}
    )
    job = job_of((5, candidates), (10, -(-candidates // 3)))
    slow_wall, quick_wall = (wall(m, job, ranks=8, groups=2**log_groups) for m in (machine, quick))
    assert quick_wall <= slow_wall * (1 + 1e-12)


@given(candidates=st.integers(1, 30), groups=st.sampled_from([1, 2, 4, 8]))
def test_a_search_takes_at_least_its_work_and_its_longest_chain(candidates, groups):
    job = job_of((5, candidates), (10, -(-candidates // 3)), (20, -(-candidates // 9)))
    cost = model.search_cost(REAL, job, ranks=8, groups=groups)
    probing = cost.wall - cost.start
    assert probing >= (cost.training + cost.other) / groups * (1 - 1e-9)
    assert probing >= 20 * cost.step * (1 - 1e-9)
    assert 0 <= cost.idle < 1
    assert cost.communication <= cost.training


def test_curves_come_back_from_a_file(tmp_path):
    model.write_machine(REAL, tmp_path / "curves.json")
    assert model.read_machine(tmp_path / "curves.json") == REAL


# The program


def test_the_table_names_the_best_number_of_groups_and_its_source(capsys, tmp_path):
    program.main(["--gpus", "8", "256", "--json", str(tmp_path / "figures.json")])
    output = capsys.readouterr().out
    assert "computed, not measured" in output
    assert "30 to 200 (6,000 steps)" in output
    assert "30 to 50, 10 to 100, 4 to 200 (2,400 steps)" in output
    assert output.count("<- best") == 4


def test_tensor_parallelism_is_refused(capsys):
    assert program.main(["--config", str(ROOT / "configs" / "llama_1b_lag.yaml")]) == 2
    assert "parallel.tensor: 2 is not modelled" in capsys.readouterr().err
