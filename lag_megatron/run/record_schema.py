"""What the files of a run directory hold, member by member.

A member that is not named here may be there, of any type: later versions add some.
"""

from typing import Annotated, Any, Literal, NotRequired, Required  # pydantic takes these on 3.11

from pydantic import Field
from typing_extensions import TypedDict

from lag_megatron.config.schema.ranges import MAX_INTEGER, MAX_LAYERS

_LARGEST = 1e300  # differences and sums of such numbers are finite
_Flag = Annotated[bool, Field(strict=True)]
_Whole = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
_Layers = Annotated[int, Field(strict=True, ge=1, le=MAX_LAYERS)]
_Number = Annotated[float, Field(strict=True, ge=-_LARGEST, le=_LARGEST)]
_Loss = Annotated[float, Field(strict=True)] | None  # NaN or null of a candidate that diverged
_Status = Literal["finished", "stopped", "failed"]


class Layer(TypedDict):
    """A layer of a grown model, as ``pool.json`` has it."""

    source: _Whole
    new: _Flag
    init: str
    scale: NotRequired[_Number]
    silent: NotRequired[_Flag]


class PoolEntry(TypedDict):
    """A candidate of ``pool.json``."""

    id: str
    operator: NotRequired[str]
    source_layers: _Layers
    target_layers: _Layers
    layer_map: list[Layer]


class CurveRow(TypedDict):
    """A line of ``probe.jsonl``."""

    step: _Whole
    val_loss: _Loss
    val_loss_batches: NotRequired[list[_Loss] | None]
    ema_val_loss: NotRequired[_Loss]
    ema_val_loss_batches: NotRequired[list[_Loss] | None]


MetricsRow = TypedDict(
    "MetricsRow",
    {
        "step": _Whole,
        "tokens": NotRequired[_Whole],
        "stage": NotRequired[_Whole],
        "train/loss": NotRequired[_Loss],
        "train/grad_norm": NotRequired[_Loss],
        "train/tokens_per_second": NotRequired[_Loss],
        "val/loss": NotRequired[_Loss],
    },
)


class Failure(TypedDict):
    """Why a candidate must not be tried again."""

    reason: str


class Attempt(TypedDict):
    """An attempt to train a candidate that made no progress."""

    attempt: _Whole
    seconds: _Number


class JournalLine(TypedDict, total=False):
    """A line of ``journal.jsonl``; which members it has depends on the event."""

    event: Required[str]
    time: _Number | str
    growth: _Whole
    stage: _Whole
    step: _Whole
    steps: _Whole
    rung: _Whole
    id: str
    chosen: str
    state: str | None
    path: str
    reason: str
    seconds: _Number
    slope: _Loss
    val_loss: _Loss
    base_val_loss: _Loss
    rule: str
    goes_on: list[str]
    stopped: dict[str, str] | list[str]
    rank_correlation: _Loss
    transition: _Whole | None
    path_length: Any


MEMBERS_OF_EVENTS = {
    "stage_cut": ("stage", "steps"),
    "stage_finished": ("stage", "step"),
    "decision": ("growth", "chosen", "state"),
    "checkpoint": ("path",),
    "rung_decided": ("growth", "rung", "goes_on", "stopped"),
}


class Source(TypedDict):
    """A source of a run's text, in ``run.json``."""

    name: str
    weight: _Number
    share: _Number
    train_tokens: Annotated[int, Field(strict=True, ge=1, le=MAX_INTEGER)]
    validation_tokens: _Whole


class Text(TypedDict):
    """What ``run.json`` says of the text."""

    sources: NotRequired[list[Source] | None]
    train_tokens: NotRequired[_Whole]
    validation_tokens: NotRequired[_Whole]


class RunFacts(TypedDict, total=False):
    """``run.json``."""

    name: str
    device: str
    world_size: _Whole
    vocab_size: _Whole
    parameters: list[_Whole]
    unigram_entropy: _Loss
    data: Text | None
    data_digest: str
    data_folder: str


class DecidedCandidate(TypedDict):
    """A candidate of ``decision.json``; its curve is of steps after growth and losses."""

    id: str
    status: _Status
    reason: NotRequired[str]
    steps: _Whole
    curve: list[tuple[_Whole, _Number]]


class Rung(TypedDict):
    """A verdict of ``decision.json``."""

    rung: _Whole
    rank_correlation: NotRequired[_Loss]
    transition: NotRequired[_Whole | None]
    goes_on: NotRequired[list[str]]
    stopped: NotRequired[list[str] | dict[str, str]]


class Cost(TypedDict, total=False):
    """What an event cost, in ``decision.json``."""

    probe_steps: _Whole
    tokens: _Whole | None
    flops: _Number | None
    seconds: _Number
    coordinator_seconds: _Number
    exhaustive_steps: _Whole


class Decision(TypedDict):
    """``decision.json``."""

    growth: NotRequired[_Whole]
    rule: NotRequired[str]
    lag: _Whole
    chosen: str
    base_val_loss: NotRequired[_Number | None]
    candidates: list[DecidedCandidate]
    cost: NotRequired[Cost]
    phase_transition: NotRequired[_Whole | None]
    ties: NotRequired[list[str]]
    rung_value: NotRequired[str]
    rungs: NotRequired[list[Rung]]


class RecordedEvent(TypedDict):
    """A recorded search; a candidate of its pool may be an id alone."""

    name: str
    growth: NotRequired[_Whole]
    config: dict[str, Any]
    pool: list["RecordedCandidate | str"]
    base_val_loss: _Loss
    curves: dict[str, list[CurveRow]]


class RecordedCandidate(TypedDict):
    """A candidate of a recorded search."""

    id: str
    layer_map: NotRequired[list[Layer]]
