"""The configuration as frozen, typed values.  ``load.py`` makes them from YAML."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lag_megatron.config.schema.base import FORBID
from lag_megatron.config.schema.data import DataConfig
from lag_megatron.config.schema.model import ModelConfig
from lag_megatron.config.schema.optimizer import OptimizerConfig
from lag_megatron.config.schema.parallel import ParallelConfig
from lag_megatron.config.schema.raptr import Lengths, Probabilities, RaptrConfig

# Where, before a rung, candidates are evaluated once more, to see whether their ranking is stable.
GUARD_SHARE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Candidates of one growth event.

    With the operator ``lag`` they are the product of the given indices, block sizes, inits and
    scales; any other operator is a pool of one.

    Attributes:
        operator: how a model grows; ``identity`` grows nothing and tries ``path_length`` alone.
        index: for ``lag``: old layers before the set that is expanded, from 0.
        block_size: for ``lag``: layers of a block that is repeated, a divisor of the new layers.
        init: for ``lag``: new layers are copies, or drawn.
        scale: for ``lag``: factors on the attention and MLP outputs of new layers; in [0, 1].
        options: of any other operator.
        path_length: path lengths that each candidate is tried with; the stage has the winner's.
    """

    __pydantic_config__ = FORBID
    operator: Literal[
        "lag",
        "last",
        "random_top",
        "progressive",
        "g_stack",
        "midas",
        "interpolate",
        "slices",
        "llama_pro",
        "post_ln_identity",
        "staged",
        "identity",
    ] = "lag"
    index: Literal["all", "even"] | int | tuple[int, ...] = "all"
    block_size: Literal["all"] | int | tuple[int, ...] = "all"
    init: tuple[Literal["duplicate", "random"], ...] = ("random", "duplicate")
    scale: tuple[float, ...] = (1.0,)
    options: dict[str, Any] = field(default_factory=dict)
    path_length: tuple[Lengths, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthConfig:
    """What is tried at a growth event and how the winner is chosen.

    Attributes:
        pool: the candidates.
        rule: ``lag`` trains every candidate to the lag; ``halving`` stops the worst at each rung.
        lag: steps after growth at which the event is decided; ``auto`` looks for the phase
            transition at the ``rungs``; 0 or more.
        rungs: steps after growth at which candidates are compared, rising and ending at ``lag``;
            empty is a quarter, a half and the whole of the lag.
        eta: for ``halving``: the best ``1 / eta`` of the candidates go on from each rung; 2 or
            more.
        min_rank_correlation: for ``halving``: nobody stops at a rung while the rankings at 0.8 of
            it and at it correlate less; null is 0.4, and 0.8 for ``lag: auto``; in [-1, 1].
        rung_value: what candidates are compared by: the loss of the last evaluation, the mean of
            those in the second half before the rung, or the loss of averaged weights; ``auto`` is
            ``last`` for ``lag``, ``mean`` for ``halving``.
        eval_steps: more steps after growth at which candidates are evaluated.
        exhaustive: train every candidate to the end of the stage, for research.
        probe_groups: how many candidates are probed at a time, each on its part of the ranks;
            ``auto`` takes as many as candidates, ranks and memory allow; 1 or more.
        rung_timeout: seconds after which a group without progress ends; null is no limit; above 0.
        moments: Adam moments of new layers: those of the source layer, 0, or m = 0 with the source
            layer's v; ``auto`` depends on the operator.
        max_loss: a candidate with a larger loss, in nats, has lost.
        names: roles of parameters and the list of layers, where no table has the model's names; in
            a file, a path to such a mapping, relative to that file.
    """

    __pydantic_config__ = FORBID
    pool: PoolConfig = field(default_factory=PoolConfig)
    rule: Literal["lag", "halving"] = "halving"
    lag: int | Literal["auto"] = 200
    rungs: tuple[int, ...] = ()
    eta: int = 3
    min_rank_correlation: float | None = None
    rung_value: Literal["auto", "last", "mean", "ema"] = "auto"
    eval_steps: tuple[int, ...] = ()
    exhaustive: bool = False
    probe_groups: int | Literal["auto"] = 1
    rung_timeout: float | None = None
    moments: Literal["auto", "copy", "zero", "borrow"] = "auto"
    max_loss: float = 20.0
    names: dict[str, Any] | None = None

    @property
    def compared_by(self) -> Literal["last", "mean", "ema"]:
        """What ``rung_value`` stands for."""
        if self.rung_value == "auto":
            return "last" if self.rule == "lag" else "mean"
        return self.rung_value

    @property
    def rank_bar(self) -> float:
        """What ``min_rank_correlation`` stands for."""
        if self.min_rank_correlation is None:
            return 0.8 if self.lag == "auto" else 0.4
        return self.min_rank_correlation

    @property
    def last_rung(self) -> int:
        """The step after growth at which the rule decides at the latest."""
        return self.rungs[-1] if self.lag == "auto" else self.lag

    def rung_steps(self) -> tuple[int, ...]:
        """Steps after growth at which candidates are compared, the last rung included.

        ``halving`` without ``rungs`` takes a quarter and a half of the lag.
        """
        if self.rule == "lag" and self.lag != "auto":
            return (self.last_rung,)
        quarters = (-(-self.last_rung // 4), -(-self.last_rung // 2))
        return tuple(sorted({*(self.rungs or quarters), self.last_rung}))

    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps after growth at which a probe is evaluated, 0 and the last rung included."""
        earlier = {round(GUARD_SHARE * rung) for rung in self.rung_steps()}
        if self.rule == "lag" and self.lag != "auto" and self.compared_by != "mean":
            earlier = set()
        return tuple(sorted({0, *earlier, *self.rungs, *self.eval_steps, *self.rung_steps()}))


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A stage trains one shape; ``growth`` is the event before it (default: the global one).

    Attributes:
        steps: optimizer steps, or with ``until_slope`` the most of them; above 0.
        tokens: instead of ``steps``, which become as many as give at least that many tokens.
        path_length: in each step so many layers run, drawn anew (Random Path Training: see
            ``raptr``); several are for equal parts of the stage, one after the other.
        keep_probability: instead of ``path_length``, the probability with which each layer runs
            that is not in ``raptr.fixed``; in (0, 1].
        until_slope: ends the stage at the first validation at which the measured slope
            d log loss / d log compute has risen to this value (Staged Training's tau: Shen et al.
            2022, arXiv 2203.06211, section 4); in (-1, 0).
        schedule_position: the step of the learning rate's schedule at which the stage begins; null
            goes on from the stage before; 0 or more.
        rewind: restarts the schedule at the previous stage's final position divided by this
            (Staged Training's rho: where a model of the new size has that loss); 1 or more.
        num_layers: layers of the stage, no fewer than before; null keeps the number.
        growth: the growth event before the stage; null is the global ``growth``.
    """

    __pydantic_config__ = FORBID
    steps: int = 0
    tokens: int | None = None
    path_length: Lengths | None = None
    keep_probability: Probabilities | None = None
    until_slope: float | None = None
    schedule_position: int | None = None
    rewind: float | None = None
    num_layers: int | None = None
    growth: GrowthConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and what the run begins with.

    Attributes:
        interval: steps between two checkpoints; above 0.
        keep_last: how many of a stage are kept, the newest; above 0.
        initial: a checkpoint of DeepSpeed, Megatron-Core or transformers whose weights the run
            begins with; null draws them.
    """

    __pydantic_config__ = FORBID
    interval: int = 1000
    keep_last: int = 2
    initial: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases.

    Attributes:
        project: name of the project; null takes ``WANDB_PROJECT``, else ``lag-megatron``.
        mode: ``auto`` takes ``WANDB_DISABLED`` and ``WANDB_MODE``; without them it is online where
            an API key is found and offline elsewhere.
    """

    __pydantic_config__ = FORBID
    project: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """What a run records.

    Attributes:
        validation_interval: steps between two validations; above 0.
        log_interval: steps between two lines of the log; above 0.
        wandb: Weights & Biases.
    """

    __pydantic_config__ = FORBID
    validation_interval: int = 100
    log_interval: int = 10
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run.

    Attributes:
        model: the model's shape.
        stages: the stages of the run in their order, or a policy that stands for them.
        data: text, tokenizer and objective.
        optimizer: the optimizer and its learning rate.
        parallel: how the work is spread over ranks.
        growth: the growth event before each stage that has none of its own.
        raptr: settings of Random Path Training.
        checkpoint: when checkpoints are written.
        tracking: what a run records.
        deepspeed: options of DeepSpeed's own JSON that this schema does not name.
        seed: of initialisation, growth and dropout; ``data.seed`` is the text's.
    """

    __pydantic_config__ = FORBID
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    raptr: RaptrConfig = field(default_factory=RaptrConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    seed: int = 1234

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, all stages together."""
        return sum(stage.steps for stage in self.stages)

    def layers_of(self, stage: int) -> int:
        """Number of layers in stage ``stage``; a stage that names none keeps the one before."""
        for earlier in reversed(self.stages[: stage + 1]):
            if earlier.num_layers is not None:
                return earlier.num_layers
        return self.model.num_layers

    def grows(self, stage: int) -> bool:
        """Whether stage ``stage`` has more layers than the one before."""
        return stage > 0 and self.layers_of(stage) > self.layers_of(stage - 1)

    def has_event(self, stage: int) -> bool:
        """Whether candidates are tried before stage ``stage``: grown, or with other paths."""
        tries_paths = stage > 0 and self.growth_before(stage).pool.operator == "identity"
        return self.grows(stage) or tries_paths

    def takes_paths(self, stage: int) -> bool:
        """Whether a step of stage ``stage`` may leave layers out."""
        settings = self.stages[stage]
        given = settings.path_length is not None or settings.keep_probability is not None
        return given or bool(self.has_event(stage) and self.growth_before(stage).pool.path_length)

    @property
    def has_paths(self) -> bool:
        """Whether a step of the run may leave layers out."""
        return any(map(self.takes_paths, range(len(self.stages))))

    def growth_before(self, stage: int) -> GrowthConfig:
        """The growth event before stage ``stage`` (1-based events: growth 1 is before stage 1)."""
        return self.stages[stage].growth or self.growth
