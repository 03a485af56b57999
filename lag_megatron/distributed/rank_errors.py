"""An error of one rank, raised on all of them, so that none waits in a collective call."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lag_megatron.errors import LagError, unwritable

T = TypeVar("T")
# What a call returned, and what it raised: a user's error, or the traceback of another one.
Outcome = tuple[Any, LagError | str | None]


class RankError(RuntimeError):
    """An unexpected error of one rank, raised on all ranks so that none waits for it."""


def attempt(make: Callable[[], Any]) -> Outcome:
    """What a call returned or raised, as values that can be pickled."""
    try:
        return make(), None
    except LagError as error:
        return None, error
    except OSError as error:
        return None, unwritable(error, "a file") or traceback.format_exc()
    except Exception:  # raised again by value_of, on every rank
        return None, traceback.format_exc()


def value_of(outcome: Outcome, *, rank: int, on_all_ranks: bool) -> Any:
    """What a call of ``rank`` returned.

    Args:
        outcome: of the call.
        rank: that called.
        on_all_ranks: whether every rank of the job raises the same error.

    Raises:
        LagError: the one that it raised.
        RankError: for any other exception.
    """
    value, error = outcome
    if isinstance(error, str):
        raise RankError(f"rank {rank} failed:\n{error}")
    if error is not None:
        error.on_all_ranks = on_all_ranks  # set here: exceptions are pickled without attributes
        raise error
    return value


def run_on_all_ranks(make: Callable[[], T]) -> list[T]:
    """Call ``make`` on every rank of the job; return all results, by rank, on every rank.

    Raises:
        LagError: on every rank, that of the first rank whose ``make`` raised one.
        RankError: on every rank, for any other exception of that rank.
    """
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, attempt(make))
    return [value_of(found, rank=rank, on_all_ranks=True) for rank, found in enumerate(outcomes)]
