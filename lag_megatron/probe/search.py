"""A growth event from its announcement to the winner's state; every rank takes part."""

from pathlib import Path

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.integrity import require_sound
from lag_megatron.engine import Engine
from lag_megatron.growth.layer_map import draw
from lag_megatron.parallel import World
from lag_megatron.probe.coordinator import Coordinator
from lag_megatron.probe.probe import Event, ProbeResult, run_probe
from lag_megatron.probe.recorder import Recorder
from lag_megatron.probe.steps import Job
from lag_megatron.stopping import Stopped


def search(job: Job, engine: Engine, event: Event, recorder: Recorder) -> Path:
    """Probe every candidate that has no result yet, decide, and return the winner's state.

    Raises:
        Stopped: when asked to stop; finished probes are not repeated.
        RunError: when no candidate is left.
        CheckpointError: when the base is damaged or the disk too small.
    """
    world = engine.world

    def coordinator() -> Coordinator:
        return Coordinator(job, recorder.books.journal, event)

    def record(index: int, result: ProbeResult) -> None:
        world.from_coordinator(lambda: coordinator().record(index, result))

    world.from_each(lambda: _require_sound_base(world, event.base))
    world.from_coordinator(lambda: _begin(job, engine, event, recorder, coordinator()))
    while True:
        if world.any_rank(job.stop.asked):
            raise Stopped(job.stop.why)
        turn = world.from_coordinator(lambda: coordinator().next_turn())
        if turn.index is None:
            return world.from_coordinator(lambda: _conclude(recorder, coordinator()))
        index, candidate = turn.index, event.pool[turn.index]
        result = run_probe(job, engine, event, candidate, to_beat=turn.to_beat)
        outcome = result.failure or f"val loss {result.val_loss:.4f} after {result.steps} steps"
        recorder.say(
            f"probe {index + 1:>2}/{len(event.pool)}  {candidate.id:<22} "
            f"[{draw(candidate.plan.layer_map)}]  {outcome}  ({result.seconds:.1f} s)"
        )
        record(index, result)


def _require_sound_base(world: World, base: Path) -> None:
    """Every candidate grows from the base, so a flipped bit there would be in all; ranks share."""
    names = sorted(commit.check_sizes(base)["files"])
    require_sound(base, names[world.rank :: world.size])


def _begin(
    job: Job, engine: Engine, event: Event, recorder: Recorder, coordinator: Coordinator
) -> None:
    # At most: the best state so far and the one being saved.
    commit.require_space(job.run.root, needed=2 * engine.bytes_on_disk, what="probing candidates")
    coordinator.begin()
    recorder.say(
        f"growth {event.number}: {event.source_layers} -> {event.target_layers} layers, "
        f"{len(event.pool)} candidates, {event.growth.lag} steps each, "
        f"validation loss before {event.base_val_loss:.4f}"
    )


def _conclude(recorder: Recorder, coordinator: Coordinator) -> Path:
    decision, rows = coordinator.decide()
    recorder.measured(*rows)
    recorder.about_to_save()  # the decision below must not outlive them
    state = coordinator.announce(decision)
    finished = [c for c in decision["candidates"] if c["status"] == "finished"]
    at_zero = min(finished, key=lambda c: c["curve"][0][1])
    chosen = next(c for c in finished if c["id"] == decision["chosen"])
    prefix = f"growth{decision['growth']:02d}"
    recorder.books.wandb.summary(
        {
            f"{prefix}/chosen": decision["chosen"],
            f"{prefix}/probe_steps": decision["cost"]["probe_steps"],
        }
    )
    last = [c["curve"][-1][1] for c in finished]
    recorder.say(
        f"decision: {chosen['id']} has the lowest validation loss after {decision['lag']} steps: "
        f"{chosen['curve'][-1][1]:.4f} (worst {max(last):.4f}). LAG@0 would have chosen "
        f"{at_zero['id']}: {at_zero['curve'][-1][1]:.4f}"
    )
    return state
