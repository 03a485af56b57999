"""Replaying a rule on recorded curves: its choice and its cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lag_megatron.config import GrowthConfig
from lag_megatron.errors import RunError
from lag_megatron.selection.curve import Curves, Evaluation, is_compared, rung_value
from lag_megatron.selection.rules import Verdict, guard_step, has_guard, judge

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """The outcome of a rule on recorded curves.

    Attributes:
        chosen: the candidate it would have chosen.
        lag: the step after growth at which it would have decided.
        steps: optimizer steps each candidate would have taken.
        verdicts: one a rung.
        status: how each candidate would have ended.
        reasons: text on why it would have stopped or failed; empty for those that finished.
    """

    chosen: str
    lag: int
    steps: dict[str, int]
    verdicts: tuple[Verdict, ...]
    status: dict[str, Status]
    reasons: dict[str, str]

    @property
    def probe_steps(self) -> int:
        """Optimizer steps of all candidates together."""
        return sum(self.steps.values())


def replay(growth: GrowthConfig, curves: Curves, *, pool: Sequence[str]) -> Replay:
    """Run the rule of ``growth`` over recorded curves as the live coordinator would.

    Only evaluations at ``growth.evaluation_steps()`` are used, as in the run, even where more were
    recorded.  A candidate fails where its curve ends before an
    evaluation that the rule needs, is not finite or is above ``growth.max_loss``; its steps are
    those of its last evaluation before.

    Raises:
        RunError: when an evaluation that the rule needs was recorded for no candidate, or when no
            candidate is left.
    """
    recording = _Recording(growth, curves, pool)
    alive, verdicts = list(pool), []
    for rung in growth.rung_steps():
        recording.require(rung)
        alive = [id_ for id_ in alive if recording.reaches(id_, rung)]
        if not alive:
            raise RunError(recording.no_candidate_left(rung))
        verdict = judge(growth, rung, recording.until(rung), alive=alive)
        verdicts.append(verdict)
        for id_, reason in verdict.stopped.items():
            recording.end(id_, "stopped", rung, reason)
        alive = [id_ for id_ in alive if id_ in verdict.goes_on]
        if verdict.decided:
            break
    for id_ in alive:
        recording.end(id_, "finished", verdicts[-1].rung, "")
    return Replay(
        chosen=verdicts[-1].goes_on[0],
        lag=verdicts[-1].rung,
        steps={id_: recording.ends[id_].steps for id_ in pool},
        verdicts=tuple(verdicts),
        status={id_: recording.ends[id_].status for id_ in pool},
        reasons={id_: recording.ends[id_].reason for id_ in pool},
    )


@dataclass(frozen=True, slots=True)
class _End:
    status: Status
    steps: int
    reason: str


@dataclass(slots=True)
class _Recording:
    """The recorded curves, at the steps that the rule would have evaluated, and how they end."""

    growth: GrowthConfig
    recorded: Curves
    pool: Sequence[str]
    ends: dict[str, _End] = field(default_factory=dict)

    def end(self, id_: str, status: Status, steps: int, reason: str) -> None:
        self.ends[id_] = _End(status, steps, reason)

    def until(self, rung: int) -> dict[str, list[Evaluation]]:
        """The evaluations that the coordinator would have had at ``rung``."""
        planned = set(self.growth.evaluation_steps())
        return {
            id_: [
                e
                for e in self.recorded.get(id_, ())
                if e.step in planned
                and e.step <= (self.ends[id_].steps if id_ in self.ends else rung)
            ]
            for id_ in self.pool
        }

    def require(self, rung: int) -> None:
        known = sorted({e.step for id_ in self.pool for e in self.recorded.get(id_, ())})
        missing = [step for step in _needed(self.growth, rung) if step not in known]
        if missing:
            raise RunError(
                f"the rule {self.growth.rule} with lag {self.growth.lag} compares candidates at "
                f"steps {missing} after growth, where none was evaluated. Recorded are {known}. "
                "Choose rungs among them, or record more with growth.eval_steps."
            )
        averages = {
            e.step
            for id_ in self.pool
            for e in self.recorded.get(id_, ())
            if e.average_loss is not None
        }
        if self.growth.compared_by == "ema" and rung not in averages:
            raise RunError(
                f"growth.rung_value: 'ema' compares the losses of averaged weights at step {rung}, "
                f"where none was recorded (recorded: {sorted(averages)}). Choose another value."
            )

    def reaches(self, id_: str, rung: int) -> bool:
        """Whether the candidate reaches the rung with a value; records its end if it does not."""
        curve = {e.step: e for e in self.until(rung)[id_]}
        good = 0
        for step in sorted({*curve, *_needed(self.growth, rung)}):
            if reason := self._failure(curve.get(step), step):
                self.end(id_, "failed", good, reason)
                return False
            good = step
        if rung_value(self.growth.compared_by, list(curve.values()), rung) is None:
            self.end(id_, "failed", good, f"no {self.growth.compared_by} value at step {rung}")
            return False
        return True

    def _failure(self, evaluation: Evaluation | None, step: int) -> str:
        if evaluation is None:
            return f"no validation loss at step {step}"
        if not math.isfinite(evaluation.loss):
            return f"validation loss {evaluation.loss} at step {step}"
        if evaluation.loss > self.growth.max_loss:
            return (
                f"validation loss {evaluation.loss:.4g} is above growth.max_loss "
                f"{self.growth.max_loss} at step {step}"
            )
        return ""

    def no_candidate_left(self, rung: int) -> str:
        reasons = "\n".join(f"  {id_}: {self.ends[id_].reason}" for id_ in self.pool)
        return f"none of the {len(self.pool)} candidates is left at step {rung}.\n{reasons}"


def _needed(growth: GrowthConfig, rung: int) -> list[int]:
    """Steps up to ``rung`` whose evaluations the verdict there depends on."""
    planned = [step for step in growth.evaluation_steps() if step <= rung]
    if growth.lag == "auto":
        return planned
    guarded = growth.rule == "halving" and has_guard(growth) and rung < growth.last_rung
    compared = (rung, guard_step(rung)) if guarded else (rung,)
    return [
        step
        for step in planned
        if any(is_compared(growth.compared_by, step, rung=end) for end in compared)
    ]
