"""A growth event from its announcement to the winner's state; every rank takes part."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import require_sound
from lag_megatron.distributed.world import World
from lag_megatron.engine.training_context import Job
from lag_megatron.growth.operators.layer_map import format_layer_map
from lag_megatron.run.recorder import Recorder
from lag_megatron.run.signals import Stopped
from lag_megatron.search.candidates import Entry
from lag_megatron.search.coordinator import Coordinator
from lag_megatron.search.event import Event, Progress
from lag_megatron.search.rpc import Desk, desk_of
from lag_megatron.search.worker import ProbeGroup
from lag_megatron.selection import least_disturbed


def search(world: World, group: ProbeGroup, recorder: Recorder) -> Path:
    """Probe every candidate as far as the rule asks, decide, and return the winner's state.

    Args:
        world: all ranks of the run.
        group: this rank's probe group.
        recorder: of the run.

    Raises:
        Stopped: when asked to stop; what was trained is saved.
        RunError: when no candidate is left.
        CheckpointError: when the base is damaged or the disk too small.
    """
    event = group.event
    world.from_each(lambda: _require_sound_base(world, event.base))
    made: list[Coordinator] = []
    world.from_coordinator(lambda: made.append(_coordinator(group, recorder)))
    coordinator = made[0] if made else None
    with desk_of(world, group.world, coordinator, group.job.stop) as desk:
        _work(group, desk)
    return world.from_coordinator(lambda: _conclude(recorder, made[0]))


def _work(group: ProbeGroup, desk: Desk | None) -> None:
    """Take turns until there are none; ``desk`` is the leader's."""
    world = group.world
    while True:
        turn = world.from_coordinator(lambda: _leader(desk).ask(group.holds))
        if turn.stop:
            raise Stopped(turn.stop)
        if turn.candidate is None:
            return
        try:
            progress = group.advance(turn, lambda progress: _leader(desk).may_win(progress))
        except Stopped as reason:
            _stop(world, desk, str(reason))
            raise
        _record(world, desk, progress)


def _record(world: World, desk: Desk | None, progress: Progress) -> None:
    world.from_coordinator(lambda: _leader(desk).record(progress))


def _stop(world: World, desk: Desk | None, reason: str) -> None:
    world.from_coordinator(lambda: _leader(desk).stop(reason))


def _leader(desk: Desk | None) -> Desk:
    assert desk is not None, "only a group's leader talks to the coordinator"
    return desk


def _require_sound_base(world: World, base: Path) -> None:
    """Every candidate grows from the base, so a flipped bit there would be in all; ranks share."""
    names = sorted(manifest.check_sizes(base)["files"])
    require_sound(base, names[world.rank :: world.size])


def _coordinator(group: ProbeGroup, recorder: Recorder) -> Coordinator:
    event, job = group.event, group.job
    there = sum(file.stat().st_size for file in _saved(job, event))
    needed = _states(group) * group.engine.bytes_on_disk - there
    manifest.require_space(job.run.root, needed=needed, what="probing candidates")

    def told(entry: Entry, progress: Progress, number: int) -> None:
        _say_progress(recorder, event, entry, progress, number)
        _mirror_progress(recorder, job, event, entry, progress)

    coordinator = Coordinator(job, recorder.books.journal, event, told)
    coordinator.begin()
    rungs = ", ".join(map(str, event.rungs))
    recorder.say(
        f"growth {event.number}: {event.source_layers} -> {event.target_layers} layers, "
        f"{len(event.pool)} candidates, rule {event.growth.rule}, rungs {rungs}, "
        f"validation loss before {event.base_val_loss:.4f}"
    )
    return coordinator


def _states(group: ProbeGroup) -> int:
    """How many saved states lie on disk at most.

    Every candidate's, or, where there is one rung, the best one's; and in each group one that is
    being saved, beside its forerunner on the way to the rung, if that is not counted yet.
    """
    event, alone = group.event, group.event.rungs == (group.event.decides_at,)
    kept = 1 if alone and not event.growth.exhaustive else len(event.pool)
    on_the_way = group.job.config.checkpoint.interval < event.rungs[-1] and kept == 1
    return kept + group.count * (2 if on_the_way else 1)


def _saved(job: Job, event: Event) -> Iterator[Path]:
    """Files of states that an interrupted event has left."""
    return job.run.growth(event.number).glob("*/step*/*")


def _say_progress(
    recorder: Recorder, event: Event, entry: Entry, progress: Progress, group: int
) -> None:
    layer_map = event.pool[entry.index].plan.layer_map
    outcome = progress.failure or (
        f"val loss {entry.curve[progress.rung].loss:.4f} after {progress.steps} steps"
    )
    recorder.say(
        f"probe {entry.index + 1:>2}/{len(event.pool)}  {entry.id:<22} "
        f"[{format_layer_map(layer_map)}]  {outcome}  ({progress.seconds:.1f} s, group {group})"
    )


def _mirror_progress(
    recorder: Recorder, job: Job, event: Event, entry: Entry, progress: Progress
) -> None:
    """The curve of a probe becomes a W&B run of its own, whose steps count from growth."""
    rows = [{**row, "step": int(row["step"]) - event.base_step} for row in progress.trained]
    first = int(rows[0]["step"]) - 1 if rows else 0
    for line in progress.evaluations:
        if line["step"] > first or not first:
            step = event.base_step + line["step"]
            row = job.validation_row(step, stage=event.number, loss=line["val_loss"])
            rows.append({**row, "step": line["step"]})
    rows.sort(key=lambda row: (row["step"], "val/loss" in row))
    summary = {"status": entry.status, "rung": progress.rung, "reason": entry.reason}
    recorder.books.wandb.probe(event.number, entry.id, rows, summary=summary)


def _conclude(recorder: Recorder, coordinator: Coordinator) -> Path:
    decision, rows = coordinator.decide()
    recorder.measured(*rows)
    recorder.about_to_save()  # the decision below must not outlive them
    state = coordinator.announce(decision)
    _say_decision(recorder, decision)
    return state


def _say_decision(recorder: Recorder, decision: dict[str, Any]) -> None:
    lag = decision["lag"]
    curves = {c["id"]: dict(c["curve"]) for c in decision["candidates"] if c["status"] != "failed"}
    at_zero = least_disturbed({id_: curve.get(0) for id_, curve in curves.items()})
    at_lag = [curve[lag] for curve in curves.values() if lag in curve]
    chosen = decision["chosen"]
    recorder.say(
        f"decision: {chosen} with validation loss {curves[chosen][lag]:.4f} after {lag} steps "
        f"({len(at_lag)} came so far, the worst of them {max(at_lag):.4f})."
        + (f" LAG@0 would have chosen {at_zero}" if at_zero else "")
        + (f": {curves[at_zero][lag]:.4f}" if at_zero and lag in curves[at_zero] else "")
    )
