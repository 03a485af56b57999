"""Whole runs on forked ranks: topologies, rules, failures, and going on."""

import json
import math
import shutil

import pytest
from conftest import run_ranks, sparing
from whole_runs import decision_of, losses_of, train

from lag_megatron.errors import CheckpointError, DataError, LagError, RunError


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_tree):
    """One rank, ZeRO-0, no dropout: what every topology has to agree with."""
    folder = tmp_path_factory.mktemp("reference")
    config = tiny_tree(folder)
    run_ranks(train, 1, config, folder / "run", ["model.dropout=0.0", "parallel.zero_stage=0"])
    return folder / "run"


@pytest.mark.parametrize(
    ("zero_stage", "tensor", "world_size", "precision"),
    sparing(
        [(0, 1, 2, "fp32"), (1, 1, 2, "fp32"), (2, 1, 2, "fp32"), (3, 1, 2, "fp32"),
         (1, 2, 2, "fp32"), (3, 2, 2, "fp32"), (1, 2, 4, "fp32"), (1, 1, 2, "bf16")],
        slow=lambda at: at[:2] != (3, 1) and at[3] == "fp32",
    ),
)  # fmt: skip
def test_every_topology_trains_grows_and_decides_alike(
    zero_stage, tensor, world_size, precision, reference, tiny, tmp_path
):
    overrides = [
        "model.dropout=0.0",
        f"parallel.zero_stage={zero_stage}",
        f"parallel.tensor={tensor}",
        f"parallel.precision={precision}",
    ]
    run_ranks(train, world_size, tiny, tmp_path / "run", overrides)
    tolerance = 2e-5 if precision == "fp32" else 2e-2
    for key in ("train/loss", "val/loss"):
        ours, theirs = losses_of(tmp_path / "run", key), losses_of(reference, key)
        assert ours.keys() == theirs.keys()
        worst = max(abs(ours[step] - theirs[step]) for step in ours)
        assert worst < tolerance, (key, worst)
    if precision == "fp32":
        ours, theirs = decision_of(tmp_path / "run"), decision_of(reference)
        assert ours["chosen"] == theirs["chosen"]


@pytest.mark.parametrize("operator", ["last", "random_top"])
def test_a_fixed_operator_is_a_pool_of_one(operator, tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "run", [f"growth.pool={{operator: {operator}}}"])
    assert decision_of(tmp_path / "run")["chosen"] == operator
    assert sorted(losses_of(tmp_path / "run", "train/loss")) == list(range(1, 21))


@pytest.mark.parametrize("lag", [0, 10])
def test_the_shortest_and_the_longest_lag(lag, tiny, tmp_path):
    overrides = [f"growth.lag={lag}", f"growth.rungs={[lag] if lag else []}"]
    run_ranks(train, 2, tiny, tmp_path / "run", overrides)
    decision = decision_of(tmp_path / "run")
    assert decision["cost"]["probe_steps"] == len(decision["candidates"]) * lag
    assert sorted(losses_of(tmp_path / "run", "train/loss")) == list(range(1, 21))
    assert losses_of(tmp_path / "run", "val/loss")[20] > 0


def test_stages_of_one_shape_go_on_without_an_event(tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "two", ["stages=[{steps: 6}, {steps: 5}]"])
    run_ranks(train, 2, tiny, tmp_path / "one", ["stages=[{steps: 11}]"])
    two, one = (losses_of(tmp_path / name, "train/loss") for name in ("two", "one"))
    assert two == one
    assert not (tmp_path / "two" / "growth01").exists()


def highest_loss(probe):
    """Of all losses that a candidate showed, in training and in validation."""
    lines = [line for path in probe.glob("*.jsonl") for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return max(row.get("val_loss", row.get("train/loss")) for row in rows)


def test_candidates_that_diverge_lose_and_the_event_goes_on(tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "calm")
    worst = sorted(highest_loss(folder) for folder in (tmp_path / "calm" / "growth01").glob("i*"))
    bound = (worst[0] + worst[-1]) / 2
    run_ranks(train, 2, tiny, tmp_path / "strict", [f"growth.max_loss={bound}"])
    decision = decision_of(tmp_path / "strict")
    failed = [c for c in decision["candidates"] if c["status"] == "failed"]
    assert failed
    assert all("is above growth.max_loss" in c["reason"] for c in failed)
    assert decision["chosen"] not in [c["id"] for c in failed]


def test_an_event_without_survivors_says_why(tiny, tmp_path):
    with pytest.raises(RunError, match=r"growth\.max_loss") as raised:
        run_ranks(train, 2, tiny, tmp_path / "run", ["growth.max_loss=0.01"])
    assert "i0-b1-duplicate" in str(raised.value)


def test_a_loss_that_is_not_a_number_ends_the_run(tiny, tmp_path):
    with pytest.raises(RunError, match="is nan at step"):
        run_ranks(train, 2, tiny, tmp_path / "run", ["optimizer.lr=1e30", "optimizer.grad_clip=0"])


def test_other_settings_in_the_same_directory_are_refused(tiny, tmp_path):
    run_ranks(train, 1, tiny, tmp_path / "run", ["stages=[{steps: 2}]"])
    with pytest.raises(RunError, match=r"model\.hidden_size"):
        run_ranks(train, 1, tiny, tmp_path / "run", ["stages=[{steps: 2}]", "model.hidden_size=16"])
    with pytest.raises(RunError, match="--resume never"):
        run_ranks(train, 1, tiny, tmp_path / "run", ["stages=[{steps: 2}]"], "never")


def test_a_missing_file_of_text_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        run_ranks(train, 2, tiny, tmp_path / "run", ["data.paths=[nowhere.txt]"])


@pytest.fixture
def halfway(tiny, tmp_path):
    """A run that stands at step 8 of 10, with checkpoints at 4 and 8."""
    with pytest.raises(LagError, match=r"growth\.max_loss"):
        run_ranks(train, 2, tiny, tmp_path / "run", ["growth.max_loss=0.01"])
    return tmp_path / "run"


def newest_of(run_dir):
    return sorted((run_dir / "stage00").glob("step*"))[-1]


@pytest.mark.parametrize("damage", ["truncate", "delete file", "delete tag"])
def test_a_damaged_checkpoint_is_refused(damage, halfway, tiny):
    newest = newest_of(halfway)
    shard = next(newest.glob("*_optim_states.pt"))
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "delete file":
        shard.unlink()
    else:
        shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match=newest.name):
        run_ranks(train, 2, tiny, halfway, ["growth.max_loss=0.01"])


def test_a_tag_that_is_not_there_is_named(halfway, tiny):
    with pytest.raises(RunError, match="--resume step7"):
        run_ranks(train, 2, tiny, halfway, ["growth.max_loss=0.01"], "step7")


def test_going_back_puts_aside_what_came_after(tiny, tmp_path):
    run_dir = tmp_path / "run"
    run_ranks(train, 2, tiny, run_dir)
    curve, decision = losses_of(run_dir, "train/loss"), decision_of(run_dir)
    first = sorted((run_dir / "stage00").glob("step*"))[0].name
    with pytest.raises(LagError, match="stop here"):
        run_ranks(train, 2, tiny, run_dir, (), first, stop_in_growth)
    assert (run_dir / "rewound" / "00" / "growth01" / "decision.json").is_file()
    assert (run_dir / "rewound" / "00" / "stage01").is_dir()
    run_ranks(train, 2, tiny, run_dir)
    assert losses_of(run_dir, "train/loss") == curve
    for each in (decision, ours := decision_of(run_dir)):
        del each["cost"]["seconds"], each["cost"]["coordinator_seconds"]
    assert ours == decision


def stop_in_growth():
    from lag_megatron.training import trainer

    def stop(*arguments):
        raise LagError("stop here")

    trainer.search = stop


def test_other_text_under_a_run_is_refused(tiny, corpus, tmp_path):
    import yaml

    tree = yaml.safe_load(tiny.read_text())
    mine = tmp_path / "text"
    shutil.copytree(corpus, mine)
    tree["data"]["paths"] = [str(mine)]
    tiny.write_text(yaml.safe_dump(tree))
    overrides = ["growth.max_loss=0.01"]
    with pytest.raises(RunError, match=r"growth\.max_loss"):
        run_ranks(train, 2, tiny, tmp_path / "run", overrides)
    (mine / "more.txt").write_text("some words that were not there " * 50)
    with pytest.raises(RunError, match="not what this run began with"):
        run_ranks(train, 2, tiny, tmp_path / "run", overrides)


def poisonous_gradient():
    from lag_megatron.engine import engine

    honest = engine.loss_sums

    def losses(model, batch):
        result = honest(model, batch)
        if model.training and float(batch["tokens"].sum()) >= 0 and engine_steps(model) == 6:
            result = result + (result - result).detach() / result.detach().new_zeros(1).sqrt()
        return result

    def engine_steps(model):
        return model.global_steps

    engine.loss_sums = losses


@pytest.mark.parametrize("zero_stage", sparing([0, 1, 3], slow=lambda stage: stage != 1))
def test_a_gradient_that_is_not_finite_is_never_saved(zero_stage, tiny, tmp_path):
    overrides = [f"parallel.zero_stage={zero_stage}", "checkpoint.interval=1"]
    with pytest.raises(RunError, match="at step 7; nothing of this step was saved"):
        run_ranks(train, 2, tiny, tmp_path / "run", overrides, "auto", poisonous_gradient)
    assert newest_of(tmp_path / "run").name == "step00000006"
    run_ranks(train, 2, tiny, tmp_path / "run", overrides)
    losses = losses_of(tmp_path / "run", "train/loss")
    assert all(math.isfinite(loss) for loss in losses.values())


def broken_journal():
    from lag_megatron.run.journal import Journal

    def append(self, event, **fields):
        raise OSError(5, "Input/output error")

    Journal.append = append


def test_what_fails_on_rank_0_alone_ends_all_ranks(tiny, tmp_path):
    with pytest.raises((OSError, RuntimeError), match="Input/output error"):
        run_ranks(train, 2, tiny, tmp_path / "run", (), "auto", broken_journal, timeout=60)


def disk_fills_up():
    import torch

    def save(*arguments, **options):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")

    if torch.distributed.is_available():
        import os

        if os.environ["RANK"] == "1":
            torch.save = save


def test_a_rank_that_cannot_write_ends_with_its_message(tiny, tmp_path, capfd):
    with pytest.raises(ChildProcessError):
        run_ranks(train, 2, tiny, tmp_path / "run", (), "auto", disk_fills_up, timeout=60)
    assert "[rank 1] CheckpointError" in capfd.readouterr().err


def no_space():
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000)


def test_a_full_disk_is_told_before_it_is_written_to(tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "text", ["stages=[{steps: 1}]"])
    shutil.copytree(tmp_path / ".cache", tmp_path / "full" / ".cache")
    with pytest.raises(LagError, match="free"):
        run_ranks(train, 2, tiny, tmp_path / "full" / "run", (), "auto", no_space)
    assert not list((tmp_path / "full" / "run").glob("stage*/step*"))


@pytest.mark.slow
def test_a_run_goes_on_on_other_ranks(reference, tiny, tmp_path, capfd):
    settings = ["model.dropout=0.0", "checkpoint.interval=2"]
    with pytest.raises(RunError, match="at step 7"):
        run_ranks(train, 2, tiny, tmp_path / "run", settings, "auto", poisonous_gradient)
    assert newest_of(tmp_path / "run").name == "step00000006"
    spread = [*settings, "parallel.zero_stage=3", "parallel.tensor=2", "parallel.micro_batch=1"]
    run_ranks(train, 4, tiny, tmp_path / "run", spread)
    assert "spreading the state anew" in capfd.readouterr().out
    for key in ("train/loss", "val/loss"):
        ours, theirs = losses_of(tmp_path / "run", key), losses_of(reference, key)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in ours) < 2e-5
    assert decision_of(tmp_path / "run")["chosen"] == decision_of(reference)["chosen"]


def test_a_run_does_not_go_on_with_other_numbers(tiny, tmp_path):
    with pytest.raises(RunError, match="at step 7"):
        run_ranks(train, 2, tiny, tmp_path / "run", (), "auto", poisonous_gradient)
    for change in ("parallel.global_batch=16", "parallel.precision=bf16", "seed=1"):
        with pytest.raises(RunError, match=f"other settings: {change.partition('=')[0]}"):
            run_ranks(train, 2, tiny, tmp_path / "run", [change])


def test_llama_shape_runs_on_one_rank(tiny, tmp_path):
    overrides = [
        "model.positions=rope", "model.norm=rmsnorm", "model.activation=swiglu",
        "model.bias=false", "model.tied_embeddings=false", "model.num_query_groups=1",
        "optimizer.schedule={name: cosine, warmup_steps: 3, min_lr: 1.0e-4}",
    ]  # fmt: skip
    run_ranks(train, 1, tiny, tmp_path / "run", overrides)
    rates = losses_of(tmp_path / "run", "train/lr")
    assert rates[20] < rates[4]
    assert all(math.isfinite(x) for x in losses_of(tmp_path / "run", "train/loss").values())
