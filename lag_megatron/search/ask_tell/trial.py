"""What ``Search.ask`` hands out, and the winner that a search ends with."""

from dataclasses import dataclass
from pathlib import Path

from lag_megatron.growth.plan import GrowthPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Train one candidate from one rung to the next.

    Attributes:
        id: the candidate's name in the pool.
        plan: its growth plan.
        index: its place in the pool.
        worker: the worker that asked.
        attempt: how often the candidate has been handed out, this time included.
        is_first: whether ``state`` is the base, to be grown by ``plan``.
        state: the base, or the folder that an earlier trial of the candidate saved.
        first_step: steps that the state has taken since growth.
        last_step: the step after growth to train to.
        evaluate_at: steps after growth at which validation losses are wanted, in rising order; 0 is
            right after growing.
        save_dir: an empty folder for the state at ``last_step``.
    """

    id: str
    plan: GrowthPlan
    index: int
    worker: int
    attempt: int
    is_first: bool
    state: Path
    first_step: int
    last_step: int
    evaluate_at: tuple[int, ...]
    save_dir: Path

    @property
    def needs_state(self) -> bool:
        """Whether the state at ``last_step`` has to be in ``save_dir`` before ``tell``.

        Without the losses no candidate can be ruled out, so this is True.
        :meth:`~lag_megatron.search.ask_tell.search.Search.needs_state` answers by the losses, which
        spares saving the states of candidates that have just lost.
        """
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Winner:
    """The candidate that a search has chosen.

    Attributes:
        id: its name in the pool.
        plan: its growth plan.
        state: the folder that its last trial saved.
        steps: optimizer steps that the state has taken since growth.
        ties: ids of the candidates that the validation batches cannot tell from it.
    """

    id: str
    plan: GrowthPlan
    state: Path
    steps: int
    ties: tuple[str, ...]
