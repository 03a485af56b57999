"""A growth event from its start to the winner's state; every rank of the run takes part."""

from collections.abc import Iterator
from pathlib import Path

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import require_sound
from lag_megatron.distributed.world import World
from lag_megatron.run.recorder import Recorder
from lag_megatron.run.signals import Stopped
from lag_megatron.search.context import SearchContext
from lag_megatron.search.coordinator import Coordinator
from lag_megatron.search.event import GrowthEvent, ProbeResult
from lag_megatron.search.probe_log import ProbeLog
from lag_megatron.search.rpc import CoordinatorClient, connect
from lag_megatron.search.worker import ProbeWorker


def search(world: World, worker: ProbeWorker, recorder: Recorder) -> Path:
    """Probe every candidate as far as the rule asks, decide, and return the winner's state.

    Args:
        world: all ranks of the run.
        worker: of this rank's probe group.
        recorder: of the run.

    Raises:
        Stopped: when the run is asked to end; what was trained is saved.
        RunError: when no candidate is left.
        CheckpointError: when the base is damaged or the disk too small.
    """
    event, context = worker.event, worker.context
    log = ProbeLog(recorder, event, tokens_per_step=context.costs.tokens_per_step)
    world.run_on_all_ranks(lambda: _require_sound_base(world, event.base))
    made: list[Coordinator] = []
    world.run_on_rank0(lambda: made.append(_coordinator(worker, recorder, log)))
    coordinator = made[0] if made else None
    with connect(world, worker.world, coordinator, context.stop) as client:
        _work(worker, client)
    return world.run_on_rank0(lambda: _conclude(made[0], recorder, log))


def _work(worker: ProbeWorker, client: CoordinatorClient | None) -> None:
    """Do assignments until there are none; ``client`` is on the group's leader alone."""
    world = worker.world
    while True:
        assignment = world.run_on_rank0(lambda: _leader(client).ask(worker.loaded_candidate))
        if assignment.stop:
            raise Stopped(assignment.stop)
        if assignment.candidate is None:
            return
        try:
            result = worker.advance(assignment, lambda r: _leader(client).needs_checkpoint(r))
        except Stopped as reason:
            _stop(world, client, str(reason))
            raise
        _record(world, client, result)


def _record(world: World, client: CoordinatorClient | None, result: ProbeResult) -> None:
    world.run_on_rank0(lambda: _leader(client).record(result))


def _stop(world: World, client: CoordinatorClient | None, reason: str) -> None:
    world.run_on_rank0(lambda: _leader(client).stop(reason))


def _leader(client: CoordinatorClient | None) -> CoordinatorClient:
    assert client is not None, "only a group's leader calls the coordinator"
    return client


def _require_sound_base(world: World, base: Path) -> None:
    """Check every file of the base, shared among the ranks: all candidates grow from it."""
    names = sorted(manifest.check_sizes(base)["files"])
    require_sound(base, names[world.rank :: world.size])


def _coordinator(worker: ProbeWorker, recorder: Recorder, log: ProbeLog) -> Coordinator:
    event, context = worker.event, worker.context
    there = sum(file.stat().st_size for file in _saved_files(context, event))
    needed = _saved_states(worker) * worker.engine.bytes_on_disk - there
    manifest.require_space(context.run.root, needed=needed, what="probing candidates")
    coordinator = Coordinator(
        context.run,
        recorder.logs.journal,
        event,
        costs=context.costs,
        on_result=log.add_result,
    )
    coordinator.begin()
    log.print_start()
    return coordinator


def _saved_states(worker: ProbeWorker) -> int:
    """How many saved states lie on disk at most.

    Every candidate's, or, where there is one rung, the best one's; and in each group one that is
    being saved, beside the one before it on the way to the rung, if that is not counted yet.
    """
    event, alone = worker.event, worker.event.rungs == (worker.event.decides_at,)
    kept = 1 if alone and not event.growth.exhaustive else len(event.pool)
    on_the_way = worker.context.checkpoint_interval < event.rungs[-1] and kept == 1
    return kept + worker.count * (2 if on_the_way else 1)


def _saved_files(context: SearchContext, event: GrowthEvent) -> Iterator[Path]:
    """Files of states that an interrupted event has left."""
    return context.run.growth(event.number).glob("*/step*/*")


def _conclude(coordinator: Coordinator, recorder: Recorder, log: ProbeLog) -> Path:
    decision, rows = coordinator.decide()
    recorder.log_metrics(*rows)
    recorder.flush_metrics()  # the decision below must not outlive them
    state = coordinator.announce(decision)
    log.print_decision(decision)
    return state
