"""What a search prints and shows in W&B; written on the coordinator's rank alone."""

from typing import Any

from lag_megatron.growth.operators.layer_map import format_layer_map
from lag_megatron.run.metrics import validation_row
from lag_megatron.run.recorder import Recorder
from lag_megatron.search.candidates import CandidateState
from lag_megatron.search.event import GrowthEvent, ProbeResult
from lag_megatron.selection import least_disturbed


class ProbeLog:
    """Log of one event.

    Args:
        recorder: of the run.
        event: what is searched.
        tokens_per_step: tokens of one global batch.
    """

    def __init__(self, recorder: Recorder, event: GrowthEvent, *, tokens_per_step: int) -> None:
        self._recorder, self._event = recorder, event
        self._tokens_per_step = tokens_per_step

    def print_start(self) -> None:
        """Print what is going to be searched."""
        event = self._event
        assert event.base_val_loss is not None, "a run validates the state that it grows"
        rungs = ", ".join(map(str, event.rungs))
        self._recorder.print(
            f"growth {event.number}: {event.source_layers} -> {event.target_layers} layers, "
            f"{len(event.pool)} candidates, rule {event.growth.rule}, rungs {rungs}, "
            f"validation loss before {event.base_val_loss:.4f}"
        )

    def add_result(self, candidate: CandidateState, result: ProbeResult, group: int) -> None:
        """Print how a probe ended, and add its new metrics to its W&B run."""
        event = self._event
        layer_map = event.pool[candidate.index].plan.layer_map
        outcome = result.failure or (
            f"val loss {candidate.curve[result.rung].loss:.4f} after {result.steps} steps"
        )
        self._recorder.print(
            f"probe {candidate.index + 1:>2}/{len(event.pool)}  {candidate.id:<22} "
            f"[{format_layer_map(layer_map)}]  {outcome}  ({result.seconds:.1f} s, group {group})"
        )
        summary = {"status": candidate.status, "rung": result.rung, "reason": candidate.reason}
        rows = self._new_rows(result)
        self._recorder.logs.wandb.probe(event.number, candidate.id, rows, summary=summary)

    def print_decision(self, decision: dict[str, Any]) -> None:
        """Print the winner beside the worst candidate and beside LAG@0's choice."""
        lag, chosen, candidates = decision["lag"], decision["chosen"], decision["candidates"]
        curves = {c["id"]: dict(c["curve"]) for c in candidates if c["status"] != "failed"}
        at_zero = least_disturbed({id_: curve.get(0) for id_, curve in curves.items()})
        at_lag = [curve[lag] for curve in curves.values() if lag in curve]
        self._recorder.print(
            f"decision: {chosen} with validation loss {curves[chosen][lag]:.4f} after {lag} steps "
            f"({len(at_lag)} came so far, the worst of them {max(at_lag):.4f})."
            + (f" LAG@0 would have chosen {at_zero}" if at_zero else "")
            + (f": {curves[at_zero][lag]:.4f}" if at_zero and lag in curves[at_zero] else "")
        )

    def _new_rows(self, result: ProbeResult) -> list[dict[str, Any]]:
        """What was measured since the probe's last result; ``step`` counts from growth."""
        event = self._event
        rows = [{**row, "step": int(row["step"]) - event.base_step} for row in result.train_rows]
        first = int(rows[0]["step"]) - 1 if rows else 0
        for line in result.evaluations:
            if line["step"] > first or not first:
                step, loss = event.base_step + line["step"], line["val_loss"]
                tokens = step * self._tokens_per_step
                row = validation_row(step, tokens=tokens, stage=event.number, loss=loss)
                rows.append({**row, "step": line["step"]})
        return sorted(rows, key=lambda row: (row["step"], "val/loss" in row))
