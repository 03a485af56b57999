"""A training program with made-up losses that drives a search by ask and tell.

python tests/support/asking.py DIRECTORY BASE WORKER [PLACE COUNT]   # where to be killed

Its state is a file with the candidate and the steps taken, which a trial has to go on from.
"""

import json
import os
import signal
import sys
import time

from probing import loss_of

from lag_megatron.search.ask_tell.search import Halving, Search, pool

BASE_STEP = 100
RULE = Halving(lag=20, rungs=(5, 10, 20))
STATE = "tag/state.json"


def make_base(path):
    """What a search reads of a checkpoint of DeepSpeed's: the header."""
    import torch

    path.mkdir(parents=True)
    header = {
        "ds_version": "0.19.8", "ds_config": {}, "dp_world_size": 1, "mp_world_size": 1,
        "global_steps": BASE_STEP, "module": {},
    }  # fmt: skip
    torch.save(header, path / "mp_rank_00_model_states.pt")
    return path


def candidates():
    """Those of ``probing.SimulatedSearch``."""
    return pool(4, 6, seed=1)


def begin(directory, base, *, rule=RULE, **options):
    return Search(directory, base=base, pool=candidates(), rule=rule, **options)


def batches_of(index, step, *, losses=loss_of):
    loss = losses(index, step)
    return [loss - 0.1, loss + 0.1]


def train(trial, *, losses=loss_of, on_step=lambda: None):
    """Go on from the trial's state; what its losses are, and those of its training steps."""
    if trial.is_first:
        assert trial.first_step == 0
    else:
        saved = json.loads((trial.state / STATE).read_text())
        assert saved == {"candidate": trial.id, "steps": trial.first_step}
    for _ in range(trial.first_step, trial.last_step):
        on_step()
    measured = {step: batches_of(trial.index, step, losses=losses) for step in trial.evaluate_at}
    steps = range(trial.first_step + 1, trial.last_step + 1)
    return measured, {step: 1.0 for step in steps}


def save(trial):
    file = trial.save_dir / STATE
    file.parent.mkdir()
    file.write_text(json.dumps({"candidate": trial.id, "steps": trial.last_step}))


def work(search, *, worker=0, losses=loss_of, point=lambda name: None, exact=False):
    """Do trials until there are none; ``point`` may kill at any named place."""
    while (trial := search.ask(worker=worker)) is not None:
        point("asked")
        measured, training = train(trial, losses=losses, on_step=lambda: point("step"))
        point("trained")
        if search.needs_state(trial, measured) if exact else trial.needs_state:
            save(trial)
        point("saved")
        search.tell(trial, measured, train_losses=training)
        point("recorded")
    return search


def decision_of(directory):
    decision = json.loads((directory / "growth01" / "decision.json").read_text())
    cost = {k: v for k, v in decision["cost"].items() if "seconds" not in k}
    return {**decision, "cost": cost}


def journal_of(directory):
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]


def states_in(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.glob("growth01/*/step*"))


def _kill_at(place, count):
    """Kill this process as ``kill -9`` does, the ``count``-th time that it comes by a place.

    The place ``fsync`` is each write that has to reach the disk, in ``ask`` and ``tell`` too.
    """
    passed, flush = [], os.fsync

    def point(name):
        passed.append(name)
        if name == place and passed.count(place) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "trained":
            time.sleep(0.01)

    def flush_at_point(handle):
        point("fsync")
        flush(handle)

    os.fsync = flush_at_point
    return point


def main():
    directory, base, worker, *kill = sys.argv[1:]
    point = _kill_at(kill[0], int(kill[1])) if kill else _kill_at("", 0)
    work(begin(directory, base), worker=int(worker), point=point)


if __name__ == "__main__":
    main()
