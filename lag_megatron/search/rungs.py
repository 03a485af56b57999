"""Rung by rung: which rung candidates are brought to, who can still win, what may be deleted."""

from lag_megatron.search.candidates import CandidateState, CandidateTable
from lag_megatron.search.event import GrowthEvent, ProbeResult
from lag_megatron.selection import can_still_win, judge, rung_value


class Rungs:
    """The progress of one event through its rungs.

    Args:
        event: what is searched.
        table: its candidates; verdicts are written to it.
    """

    def __init__(self, event: GrowthEvent, table: CandidateTable) -> None:
        self._event, self._table = event, table
        assigned_again = table.decided and table.winner.group is not None
        self._winner_needs_state = table.winner.id if assigned_again else ""

    @property
    def current(self) -> int:
        """The rung that candidates are being brought to."""
        if self._table.decided:
            return self._table.verdicts[-1].rung
        return self._event.rungs[len(self._table.verdicts)]

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        alive = self._table.alive
        if not alive:
            return True
        if self._event.growth.exhaustive:
            return all(c.reached >= self.current and c.has_saved_state for c in alive)
        return (
            self._table.decided
            and all(c.reached >= self.current for c in alive)
            and self._table.winner in alive
            and self._table.winner.has_saved_state
        )

    def needs_checkpoint(self, result: ProbeResult) -> bool:
        """Whether the candidate of a result can still win, so that its state has to be saved."""
        growth, rung, alive = self._event.growth, result.rung, self._table.alive
        mine = self._table.candidates[result.candidate]
        if growth.exhaustive or mine.id == self._winner_needs_state:
            return True
        mine.add_curve(result.evaluations)
        values = {
            candidate.id: rung_value(growth.compared_by, candidate.evaluations, rung)
            for candidate in alive
            if candidate.reached >= rung or candidate is mine
        }
        pool = [candidate.id for candidate in alive]
        return can_still_win(growth, rung, values, mine.id, pool=pool, alive=len(alive))

    def finish_current(self) -> None:
        """All candidates that are left have reached the rung: decide which of them go on."""
        alive, rung = self._table.alive, self.current
        self._winner_needs_state = ""
        if self._event.growth.exhaustive:
            for candidate in alive:
                if not candidate.has_saved_state:
                    candidate.reached = -1  # deleted since; it is trained again
            return
        if self._table.decided and self._table.winner not in alive:
            self._table.remove_last_verdict()
        if not self._table.decided:
            curves = {c.id: c.evaluations for c in self._table.candidates}
            ids = [candidate.id for candidate in alive]
            self._table.add_verdict(judge(self._event.growth, rung, curves, alive=ids))
        if self._table.decided:
            winner = self._table.winner
            if not winner.has_saved_state:  # lost with a group that died, or deleted
                winner.reached, self._winner_needs_state = -1, winner.id
                return
            for candidate in alive:
                self._table.finish(candidate)
        self.drop_states()

    def drop_states(self) -> None:
        """Delete what cannot win any more."""
        event = self._event
        if event.growth.exhaustive:
            return
        at_end = [c for c in self._table.alive if c.reached == event.decides_at]
        # A winner that was trained again stays it, whatever rounding did to its loss.
        best = (
            self._table.winner
            if self._table.decided
            else min(at_end, key=self._order, default=None)
        )
        for candidate in self._table.candidates:
            lost = candidate.status in ("stopped", "failed") or (
                candidate in at_end and candidate is not best
            )
            if lost and candidate.group is None:
                candidate.dir.keep_only(None)

    def _order(self, candidate: CandidateState) -> tuple[float, int]:
        """By value at the deciding rung; earlier in the pool wins ties."""
        growth, rung = self._event.growth, self._event.decides_at
        assert rung is not None
        value = rung_value(growth.compared_by, candidate.evaluations, rung)
        return (float("inf") if value is None else value, candidate.index)
