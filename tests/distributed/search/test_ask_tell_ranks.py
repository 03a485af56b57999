"""A search by ask and tell in a program of two ranks."""

import pytest
from asking import begin, make_base, save, train, work
from conftest import run_ranks

from lag_megatron.errors import RunError


def _search(directory, base):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, trials = dist.get_rank(), []
    search = begin(directory, base)
    while (trial := search.ask()) is not None:
        losses, training = train(trial)
        if not trials:
            with pytest.raises(RunError, match="no state in"):
                search.tell(trial, losses)
        if rank == 1:  # what rank 0 commits, all ranks have saved
            save(trial)
        search.tell(trial, losses if rank == 0 else {}, train_losses=training)
        trials.append(trial)
    report = search.report()
    dist.destroy_process_group()
    return trials, search.best, report


def test_every_rank_gets_the_same_trial(tmp_path):
    base = make_base(tmp_path / "base")
    alone = work(begin(tmp_path / "alone", base)).best
    first, second = run_ranks(_search, 2, tmp_path / "ranks", base)
    assert first == second
    trials, best, report = first
    assert len(trials) > len({trial.id for trial in trials})
    assert (best.id, best.plan, best.ties) == (alone.id, alone.plan, alone.ties)
    assert report.is_file()


def _ask_as_two_workers(directory, base):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    search = begin(directory, base)
    if dist.get_rank() == 0:
        search.ask(worker=0)
        return "trial"
    with pytest.raises(RunError, match="rank 0 asked for worker 0"):
        search.ask(worker=1)
    return "refused"


def test_the_ranks_of_one_group_are_one_worker(tmp_path):
    base = make_base(tmp_path / "base")
    assert run_ranks(_ask_as_two_workers, 2, tmp_path / "s", base) == ["trial", "refused"]
