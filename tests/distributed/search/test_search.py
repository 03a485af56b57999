"""Searches on forked ranks: groups, rules, stops and failures; nothing is done twice."""

import json
import os
import time

import pytest
from conftest import run_ranks, sparing
from read_wandb import fragments
from whole_runs import decision_of, losses_of, train

from lag_megatron.errors import ConfigError, LagError, RunError

CALM = ["model.dropout=0.0"]
HALVING = ["growth.rule=halving", "growth.lag=8", "growth.rungs=[4, 8]"]


def events_of(run_dir, name):
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def curves_of(run_dir):
    return {c["id"]: dict(c["curve"]) for c in decision_of(run_dir)["candidates"]}


def without_times(decision):
    cost = {k: v for k, v in decision["cost"].items() if "seconds" not in k}
    return {**decision, "cost": cost}


@pytest.fixture(scope="module")
def one_group(tmp_path_factory, tiny_tree):
    """One rank, halving, no dropout: what every split has to agree with."""
    folder = tmp_path_factory.mktemp("one_group")
    run_ranks(train, 1, tiny_tree(folder), folder / "run", [*CALM, *HALVING])
    return folder / "run"


@pytest.mark.parametrize(
    ("zero_stage", "tensor", "world_size", "groups"),
    sparing(
        [(1, 1, 2, 2), (3, 1, 4, 2), (1, 2, 4, 2), (2, 1, 4, 4), (1, 1, 4, "auto")],
        slow=lambda at: at[3] != "auto",
    ),
)
def test_groups_see_the_same_batches_and_decide_alike(
    zero_stage, tensor, world_size, groups, one_group, tiny, tmp_path
):
    topology = [f"parallel.zero_stage={zero_stage}", f"parallel.tensor={tensor}"]
    split = [*CALM, *HALVING, *topology, f"growth.probe_groups={groups}"]
    run_ranks(train, world_size, tiny, tmp_path / "run", split)
    ours, theirs = curves_of(tmp_path / "run"), curves_of(one_group)
    assert ours.keys() == theirs.keys()
    for id_, curve in ours.items():
        assert curve.keys() == theirs[id_].keys()
        assert all(abs(curve[step] - theirs[id_][step]) < 2e-5 for step in curve)
    for key in ("train/loss", "val/loss"):  # after growth on all ranks again
        here, there = losses_of(tmp_path / "run", key), losses_of(one_group, key)
        assert here.keys() == there.keys()
        assert max(abs(here[step] - there[step]) for step in here) < 2e-5
    count = 4 if groups == "auto" else groups
    assert {e["group"] for e in events_of(tmp_path / "run", "probe_started")} == set(range(count))


def train_from_a_cached_base(*arguments):
    """As ``train`` with the event's base cached; how many launches there were."""
    import torch

    from lag_megatron.engine import state
    from lag_megatron.engine.base_cache import BaseCache, MemoryTier

    def cache(device, **unused):
        return BaseCache([MemoryTier("memory", lambda: 1e9, torch.empty)], page=500)

    write_runs, launches = state.write_runs, []
    BaseCache.for_device = cache
    state.write_runs = lambda runs: (launches.append(len(runs)), write_runs(runs))
    train(*arguments)
    return len(launches)


def test_a_cached_base_changes_no_curve(one_group, tiny, tmp_path):
    """The first candidate comes from the shards, those that go on from their own states."""
    split = [*CALM, *HALVING]
    (launches,) = run_ranks(train_from_a_cached_base, 1, tiny, tmp_path / "run", split)
    assert launches == len(curves_of(one_group)) - 1 > 0
    assert curves_of(tmp_path / "run") == curves_of(one_group)
    assert losses_of(tmp_path / "run", "train/loss") == losses_of(one_group, "train/loss")


def test_a_number_of_groups_that_does_not_divide_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"growth\.probe_groups: 3 groups cannot share 2"):
        run_ranks(train, 2, tiny, tmp_path / "run", ["growth.probe_groups=3"])


@pytest.mark.slow
def test_an_exhaustive_run_goes_on_from_the_winner_s_end(tiny, tmp_path):
    everything = ["growth.exhaustive=true", "growth.rung_value=ema", "growth.eval_steps=[6, 9]"]
    run_ranks(train, 2, tiny, tmp_path / "run", [*CALM, *HALVING, *everything])
    decision = decision_of(tmp_path / "run")
    for candidate in decision["candidates"]:
        assert [step for step, _ in candidate["curve"]] == [0, 3, 4, 6, 8, 9, 10]
        assert (tmp_path / "run" / "growth01" / candidate["id"] / "step00000020").is_dir()
    assert decision["lag"] == 8
    losses = losses_of(tmp_path / "run", "val/loss")
    assert losses[20] == curves_of(tmp_path / "run")[decision["chosen"]][10]
    assert sorted(losses_of(tmp_path / "run", "train/loss")) == list(range(1, 21))


def at_step(step, times, action):
    """A fault: the ``times``-th time that this process takes step ``step`` of stage 1."""

    def fault():
        from lag_megatron.training.training_context import TrainingContext

        honest, seen = TrainingContext.step, []

        def take(self, engine, number, *, stage):
            if stage == 1 and number == step:
                seen.append(number)
                if len(seen) == times:
                    action(self)
            return honest(self, engine, number, stage=stage)

        TrainingContext.step = take

    return fault


@pytest.mark.parametrize(
    ("groups", "value"), sparing([(1, "ema"), (2, "last")], slow=lambda at: at[0] == 1)
)
def test_a_stop_in_a_probe_loses_no_step(groups, value, tiny, tmp_path):
    split = [*HALVING, f"growth.probe_groups={groups}", f"growth.rung_value={value}"]
    split.append("checkpoint.interval=100")
    run_ranks(train, 2, tiny, tmp_path / "undisturbed", split)

    def stop(context):
        if os.environ["RANK"] == "0":
            context.stop.ask("as by SIGTERM")

    run_dir = tmp_path / "stopped"
    for step, times in ((12, 3 - groups), (16, 1)):
        run_ranks(train, 2, tiny, run_dir, split, "auto", at_step(step, times, stop))
        assert not events_of(run_dir, "run_finished")
    run_ranks(train, 2, tiny, run_dir, split)
    assert without_times(decision_of(run_dir)) == without_times(
        decision_of(tmp_path / "undisturbed")
    )
    for key in ("train/loss", "val/loss"):
        assert losses_of(run_dir, key) == losses_of(tmp_path / "undisturbed", key)


def test_out_of_memory_costs_the_candidate_and_not_the_event(tiny, tmp_path):
    def exhausted(context):
        if os.environ["RANK"] == "1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 20 GiB")

    run_dir = tmp_path / "run"
    with pytest.raises(RunError, match="i0-b1-duplicate: out of memory on rank 1"):
        run_ranks(train, 2, tiny, run_dir, (), "auto", at_step(11, 2, exhausted))
    run_ranks(train, 2, tiny, run_dir)
    candidates = {c["id"]: c for c in decision_of(run_dir)["candidates"]}
    assert candidates["i0-b1-duplicate"]["status"] == "failed"
    assert "can't allocate memory" in candidates["i0-b1-duplicate"]["reason"]
    assert sum(c["status"] == "finished" for c in candidates.values()) == 3


def test_a_hung_rank_ends_with_all_stacks_and_at_last_costs_the_candidate(tiny, tmp_path, capfd):
    def hang(context):
        if os.environ["RANK"] == "1":
            time.sleep(600)

    run_dir, limit = tmp_path / "run", ["growth.rung_timeout=6"]
    for _ in range(2):
        with pytest.raises(ChildProcessError):
            run_ranks(train, 2, tiny, run_dir, limit, "auto", at_step(11, 1, hang), timeout=60)
        assert "no progress for growth.rung_timeout = 6 s" in capfd.readouterr().err
    stacks = run_dir / "stacks" / "i0-b1-random-rank1.txt"
    assert "in hang" in stacks.read_text()
    run_ranks(train, 2, tiny, run_dir, limit)
    first = decision_of(run_dir)["candidates"][0]
    assert (first["id"], first["status"]) == ("i0-b1-random", "failed")
    assert first["reason"] == "no progress for 6 s in 2 attempts; see stacks/"


def full_disk():
    from lag_megatron.engine.state import EngineState
    from lag_megatron.errors import CheckpointError

    def write(self, folder, growth, *, client_state):
        raise CheckpointError(f"{folder}: cannot write: No space left on device")

    if os.environ["RANK"] == "1":
        EngineState.write = write


def test_a_disk_that_fills_up_in_one_group_ends_the_run_and_damages_nothing(tiny, tmp_path):
    split, run_dir = [*CALM, *HALVING, "growth.probe_groups=2"], tmp_path / "run"
    with pytest.raises(Exception, match="No space left on device"):
        run_ranks(train, 2, tiny, run_dir, split, "auto", full_disk)
    run_ranks(train, 2, tiny, run_dir, split)
    run_ranks(train, 2, tiny, tmp_path / "undisturbed", split)
    assert without_times(decision_of(run_dir)) == without_times(
        decision_of(tmp_path / "undisturbed")
    )


@pytest.mark.parametrize("dead", sparing(["0", "1"], slow=lambda rank: rank == "0"))
def test_a_group_that_dies_stops_the_others_and_the_run_goes_on(dead, tiny, tmp_path):
    split, run_dir = [*CALM, *HALVING, "growth.probe_groups=2"], tmp_path / "run"

    def die(context):
        if os.environ["RANK"] == dead:
            os._exit(9)

    # Of the two ranks, either the one that died is reported first or the one that missed it.
    with pytest.raises((ChildProcessError, RunError), match=f"(rank|group) {dead} "):
        run_ranks(train, 2, tiny, run_dir, split, "auto", at_step(11, 1, die))
    run_ranks(train, 2, tiny, run_dir, split)
    run_ranks(train, 2, tiny, tmp_path / "undisturbed", split)
    assert without_times(decision_of(run_dir)) == without_times(
        decision_of(tmp_path / "undisturbed")
    )


def interrupted_conclusion():
    """Rank 0 ends before the decision; strangers connect to its ports before each client does."""
    import socket

    from lag_megatron.distributed import channel
    from lag_megatron.search.coordinator import Coordinator

    def announce(self, decision):
        raise LagError("end here")

    Coordinator.announce = announce
    honest = channel.connect

    def connect(port, secret, **options):
        address = os.environ["MASTER_ADDR"], port
        socket.create_connection(address).close()
        with socket.create_connection(address) as stranger, socket.create_connection(address):
            stranger.sendall(b"\0" * 100)
            return honest(port, secret, **options)

    channel.connect = connect


@pytest.mark.slow
def test_groups_meet_even_when_there_is_nothing_left_to_do(tiny, tmp_path):
    split, run_dir = [*CALM, *HALVING, "growth.probe_groups=4"], tmp_path / "run"
    with pytest.raises(LagError, match="end here"):
        run_ranks(train, 4, tiny, run_dir, split, "auto", interrupted_conclusion)
    started = len(events_of(run_dir, "probe_started"))
    run_ranks(train, 4, tiny, run_dir, split)
    assert len(events_of(run_dir, "probe_started")) == started
    assert events_of(run_dir, "run_finished")


def raised_elsewhere(count):
    """On each rank: whether another rank reports an error in its group."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.search.rank_groups import split_world

    def fail():
        raise LagError("no")

    world = start_world(tensor=1)
    part = split_world(world, count, timeout=60)
    try:
        part.run_on_rank0(fail)
    except LagError as error:
        elsewhere = error.on_all_ranks
    stop_world()
    return elsewhere


def test_an_error_in_a_group_is_reported_once_by_its_leader():
    assert run_ranks(raised_elsewhere, 4, 2) == [False, True, False, True]
    assert run_ranks(raised_elsewhere, 2, 1) == [True, True]


@pytest.mark.slow
def test_averages_of_another_topology_are_begun_again(tiny, tmp_path):
    split = [*CALM, *HALVING, "growth.rung_value=ema"]
    run_ranks(train, 2, tiny, tmp_path / "undisturbed", split)
    run_dir = tmp_path / "run"

    def stop(context):
        context.stop.ask("as by SIGTERM")

    run_ranks(train, 2, tiny, run_dir, split, "auto", at_step(16, 1, stop))
    run_ranks(train, 2, tiny, run_dir, [*split, "parallel.zero_stage=3"])
    ours, theirs = decision_of(run_dir), decision_of(tmp_path / "undisturbed")
    assert ours["chosen"] == theirs["chosen"]
    ours, theirs = curves_of(run_dir), curves_of(tmp_path / "undisturbed")
    for id_, curve in ours.items():
        assert all(abs(curve[step] - theirs[id_][step]) < 2e-5 for step in curve)


def test_wandb_shows_stages_probes_and_the_decision(tiny, tmp_path, monkeypatch):
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run_dir, settings = tmp_path / "run", ["tracking.wandb.mode=offline"]
    run_ranks(train, 2, tiny, run_dir, [*HALVING, "growth.rule=lag", *settings])
    decision = decision_of(run_dir)
    for stage in (0, 1):
        (found,) = fragments(run_dir, f"stage{stage:02d}")
        assert (found.run.job_type, found.run.run_group) == ("stage", "run")
    shown = {key: value for row in found.history for key, value in row.items()}
    assert {f"growth01/{name}._type" for name in ("heatmap", "regret", "candidates")} <= set(shown)
    table = json.loads((found.folder / "files" / shown["growth01/candidates.path"]).read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    for candidate in decision["candidates"]:
        id_, curve = candidate["id"], dict(candidate["curve"])
        row = rows[id_]
        assert (row["loss at 0"], row["loss at 8"]) == (curve[0], curve[8])
        assert (row["status"], row["chosen"]) == (candidate["status"], id_ == decision["chosen"])
        (probe,) = fragments(run_dir, f"growth01/{id_}")[:1]
        assert (probe.run.job_type, probe.run.run_group) == ("probe", "run")
    assert found.artifacts
    steps = [
        row["probe/step"]
        for probe in fragments(run_dir, f"growth01/{decision['chosen']}")
        for row in probe.history
        if "val/loss" in row
    ]
    assert steps == [0, 4, 8]
