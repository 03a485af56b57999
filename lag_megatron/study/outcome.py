"""The loss curve and the costs of a finished run, from the files of its directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lag_megatron.config import RunConfig
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.errors import RunError
from lag_megatron.planning.cost import steps_flops, tokens_per_step
from lag_megatron.report.stats.run import SPEED, TRAIN, VAL, last_event, series
from lag_megatron.report.stats.run_files import Json, RunFiles, finite, read_run


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """A validation of the run, and what everything up to it has cost.

    Right after a search there is a second point of the same step and loss, with its costs.

    Attributes:
        step: optimizer steps of the run.
        searches: how many searches are charged.
        loss: nats a token.
        flops: floating-point operations of the run's steps and of the searches before it.
        tokens: that the run itself was trained on.
        all_tokens: with those of the probes that did not win.
        seconds: of training and searching (:func:`read_outcome` says how they are added up).
    """

    step: int
    searches: int
    loss: float
    flops: float
    tokens: int
    all_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """A finished run.

    Attributes:
        layers: of each stage.
        vocab_size: as it was, where the plan may have had an estimate.
        final_loss: of the last validation, in nats a token.
        curve: every validation, the first at step 0 and the last at the end.
        search_flops: of what the searches took beyond the winners' own steps.
    """

    layers: tuple[int, ...]
    vocab_size: int
    final_loss: float
    curve: tuple[CurvePoint, ...]
    search_flops: float

    @property
    def end(self) -> CurvePoint:
        """The last validation, with the whole run's costs."""
        return self.curve[-1]


@dataclass(frozen=True, slots=True)
class _ChargedSearch:
    """What one growth event took beyond the winner's own steps, charged from ``step`` on."""

    step: int
    flops: float
    tokens: int
    seconds: float


def read_outcome(run_dir: Path) -> RunOutcome:
    """The outcome of a finished run.

    A search is charged at its growth: what its ``decision.json`` counts, evaluations included,
    without the winner's own steps, which are the run's.  A pool of one compares nothing and is
    charged nothing.  Seconds are those of the run's steps, from their tokens a second, and of the
    searches, the winner's steps taken out; probes that ran side by side count as if one after the
    other.  Validating the run itself, checkpoints and starts are not counted.

    Raises:
        RunError: if the run has not finished, or a file is missing or damaged.
    """
    files = read_run(run_dir)
    finished = last_event(files, event="run_finished")
    if finished is None:
        raise RunError(_how_far(files))
    loss, vocab_size = finite(finished.get("val_loss")), files.run.get("vocab_size")
    validations = series(files.metrics, VAL)
    total = files.config.total_steps
    if loss is None or not validations or validations[-1][0] != total:
        raise RunError(
            f"{run_dir}: finished, but metrics.jsonl has no validation loss at the end, step "
            f"{total}."
        )
    if not isinstance(vocab_size, int):
        raise RunError(f"{run_dir / 'run.json'}: has no vocab_size, which FLOPs depend on.")
    searches = _searches(files, vocab_size)
    return RunOutcome(
        layers=tuple(files.config.layers_of(s) for s in range(len(files.config.stages))),
        vocab_size=vocab_size,
        final_loss=loss,
        curve=tuple(_points(files, validations, searches, vocab_size)),
        search_flops=sum(search.flops for search in searches),
    )


def _how_far(files: RunFiles) -> str:
    steps = [line["step"] for line in files.metrics if isinstance(line.get("step"), int)]
    return f"not finished: step {max(steps, default=0):,} of {files.config.total_steps:,}"


def _points(
    files: RunFiles,
    validations: Sequence[Sequence[float]],
    searches: Sequence[_ChargedSearch],
    vocab_size: int,
) -> list[CurvePoint]:
    per_step = tokens_per_step(files.config)
    seconds = _training_seconds(files)
    points = []
    for number, loss in validations:
        step = int(number)
        charged = sum(search.step < step for search in searches)
        # A search takes its operations while the loss stands still: its end is a point as well.
        for count in range(charged, sum(search.step <= step for search in searches) + 1):
            before = searches[:count]
            points.append(
                CurvePoint(
                    step=step,
                    searches=count,
                    loss=loss,
                    flops=_own_flops(files.config, step, vocab_size) + sum(s.flops for s in before),
                    tokens=step * per_step,
                    all_tokens=step * per_step + sum(s.tokens for s in before),
                    seconds=_until(seconds, step) + sum(s.seconds for s in before),
                )
            )
    return points


def _own_flops(config: RunConfig, step: int, vocab_size: int) -> int:
    """Of the first ``step`` optimizer steps of the run."""
    return steps_flops(config, range(step), vocab_size=vocab_size)


def _training_seconds(files: RunFiles) -> list[tuple[int, float]]:
    """Each line of training metrics: its step, and the seconds since the line before it.

    Every step has a line; where some are missing, the next one's speed stands for them.
    """
    tokens, before, found = tokens_per_step(files.config), 0, []
    for number, speed in series((m for m in files.metrics if TRAIN in m), SPEED):
        if speed > 0:
            found.append((int(number), (int(number) - before) * tokens / speed))
            before = int(number)
    return found


def _until(seconds: Sequence[tuple[int, float]], step: int) -> float:
    return sum(spent for number, spent in seconds if number <= step)


def _searches(files: RunFiles, vocab_size: int) -> list[_ChargedSearch]:
    """In the order of growths; a pool of one is none."""
    return [
        _search(files, growth.decision, stage=growth.growth, vocab_size=vocab_size)
        for growth in files.growths
        if len(growth.pool) > 1
    ]


def _search(
    files: RunFiles, decision: Json | None, *, stage: int, vocab_size: int
) -> _ChargedSearch:
    where = files.path / f"growth{stage:02d}" / "decision.json"
    if decision is None:
        raise RunError(f"{where}: is missing, although the run has finished.")
    try:
        start = stage_ranges(files.config.stages)[stage].start
        cost, candidates = decision["cost"], decision["candidates"]
        own = next(c["steps"] for c in candidates if c["id"] == decision["chosen"])
        seconds = _training_seconds(files)
        own_seconds = _until(seconds, start + own) - _until(seconds, start)
        return _ChargedSearch(
            start,
            flops=cost["flops"]
            - steps_flops(files.config, range(start, start + own), vocab_size=vocab_size),
            tokens=cost["tokens"] - own * tokens_per_step(files.config),
            seconds=max(0.0, cost["seconds"] - own_seconds),
        )
    except (LookupError, TypeError, StopIteration) as error:
        raise RunError(f"{where}: is not a decision with its cost ({error!r}).") from None
