"""Ask and tell in a program's own loop decide as a run's search of the same model and data."""

import pytest
from conftest import run_ranks
from whole_runs import decision_of, train

import lag_megatron as lag

SETTINGS = ["model.dropout=0.0", "growth.rule=halving", "growth.lag=8", "growth.rungs=[4, 8]"]


class Decided(Exception):
    """Ends the run after its search."""


def search_by_ask_and_tell(directory, worker):
    """The search of an event, driven as ``docs/api.md`` tells a program to."""
    event, trainer = worker.event, worker._trainer
    engine = worker.engine.deepspeed_engine
    search = lag.Search(
        directory, base=event.base, pool=event.pool, rule=lag.Halving(lag=8, rungs=(4, 8))
    )
    while (trial := search.ask()) is not None:
        candidate = event.pool[trial.index]
        if trial.is_first:
            lag.grow_engine(engine, trial.state, trial.plan)
        else:
            engine.load_checkpoint(str(trial.state))
        losses, train_losses, done = {}, {}, trial.first_step
        for step in trial.evaluate_at:
            for taken in range(done, step):
                row, _ = trainer.train_step(candidate, event.base_step + taken)
                train_losses[taken + 1] = row["train/loss"]
            losses[step], done = trainer.evaluate(), step
        if trial.needs_state:
            engine.save_checkpoint(str(trial.save_dir))
        search.tell(trial, losses=losses, train_losses=train_losses)


def train_with(search, *arguments):
    """On each rank: a run whose search is another one, and that ends with it."""
    from lag_megatron.training import trainer

    def searched(world, worker, recorder):
        search(worker)
        raise Decided

    trainer.search = searched
    with pytest.raises(Decided):
        train(*arguments)


def judged(run_dir):
    """All of a decision but what only a run knows: its base's loss, and costs in tokens."""
    decision = decision_of(run_dir)
    assert all(len(candidate["curve"]) > 2 for candidate in decision["candidates"])
    return {k: v for k, v in decision.items() if k not in ("base_val_loss", "cost")}


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_decision_is_that_of_the_run_s_own_search(stage, tiny, tmp_path):
    settings = [*SETTINGS, f"parallel.zero_stage={stage}"]
    run_ranks(train, 2, tiny, tmp_path / "run", settings)
    asked = tmp_path / "asked"

    def search(worker):
        search_by_ask_and_tell(asked, worker)

    run_ranks(train_with, 2, search, tiny, tmp_path / "other", settings)
    assert judged(asked) == judged(tmp_path / "run")
