"""What a run would do and cost, without a GPU, without data and without torch."""

from collections.abc import Iterator, Mapping, Sequence

from lag_megatron.config import (
    ParallelConfig,
    RunConfig,
    check_probe_groups,
    data_parallel_size,
    dump_config,
)
from lag_megatron.config.schema.stage_schedule import stage_ranges
from lag_megatron.growth.operators.layer_map import format_layer_map
from lag_megatron.growth.pool import Candidate, growth_pools
from lag_megatron.planning.cost import (
    parameter_count,
    stage_flops,
    state_bytes_per_parameter,
    tokens_per_step,
    training_flops,
    training_flops_per_token,
)
from lag_megatron.planning.lr_plot import plot_lr
from lag_megatron.planning.random_paths import mean_layers_run, with_longest_paths
from lag_megatron.planning.search_cost import SearchCost, search_cost
from lag_megatron.planning.vocab_size import estimate_vocab_size
from lag_megatron.selection import planned_rungs

MIB = 2**20


def describe_run(config: RunConfig, *, world_size: int) -> str:
    """Text of a dry run on ``world_size`` ranks: configuration, sizes, costs, pools, rates.

    Raises:
        ConfigError: if the ranks or the batch do not divide.
        PlanError: if a growth of the configuration is impossible.
    """
    check_probe_groups(config, world_size=world_size)
    replicas = data_parallel_size(config.parallel, world_size=world_size)
    vocab_size, origin = estimate_vocab_size(config)
    pools = growth_pools(config)
    asked, config = config, with_longest_paths(config)  # what candidates decide, at its costliest
    schedule = [
        *(_searches(config, pools, vocab_size=vocab_size) if pools else ()),
        *_saving(config, pools, vocab_size=vocab_size),
    ]
    sections = [
        ("configuration", dump_config(asked).splitlines()),
        ("stages", _stages(config, vocab_size=vocab_size, origin=origin)),
        ("memory", _memory(config, vocab_size=vocab_size, replicas=replicas)),
        *(
            (f"growth {stage}", _growth(config, stage, pool=pool, vocab_size=vocab_size))
            for stage, pool in pools.items()
        ),
        *([("whole schedule", schedule)] if schedule else []),
        ("learning rate", plot_lr(config)),
    ]
    return "\n\n".join("\n".join((f"== {title} ==", *lines)) for title, lines in sections) + "\n"


def _stages(config: RunConfig, *, vocab_size: int, origin: str) -> Iterator[str]:
    yield f"vocabulary: {vocab_size:,} ({origin})"
    yield (
        f"{'stage':>5} {'layers':>6} {'run':>5} {'parameters':>15} {'steps':>9} {'tokens':>17} "
        f"{'FLOPs':>10}"
    )
    per_step = tokens_per_step(config)
    for number, stage in enumerate(config.stages):
        layers = config.layers_of(number)
        parameters = parameter_count(config.model, num_layers=layers, vocab_size=vocab_size)
        flops = stage_flops(config, number, vocab_size=vocab_size)
        yield _stage_row(
            str(number),
            (str(layers), _layers_run(config, number)),
            f"{parameters:,}",
            stage.steps,
            stage.steps * per_step,
            flops,
        )
    steps = config.total_steps
    yield _stage_row(
        "all", ("", ""), "", steps, steps * per_step, training_flops(config, vocab_size=vocab_size)
    )
    yield (
        f"{per_step:,} tokens a step. FLOPs: 6 x matrix parameters with the output layer "
        "+ causal attention, a token;"
    )
    yield "training only, without validation and without the probes below."


def _stage_row(
    stage: str, layers: tuple[str, str], parameters: str, steps: int, tokens: int, flops: int
) -> str:
    there, run = layers
    return (
        f"{stage:>5} {there:>6} {run:>5} {parameters:>15} {steps:>9,} {tokens:>17,} {flops:>10.3e}"
    )


def _layers_run(config: RunConfig, stage: int) -> str:
    """How many layers a step trains, on average; at most, where a pool decides."""
    decided = config.has_event(stage) and config.growth_before(stage).pool.path_length
    mean = mean_layers_run(config, stage_ranges(config.stages)[stage])
    return f"{'<=' if decided else ''}{mean:.4g}"


def _memory(config: RunConfig, *, vocab_size: int, replicas: int) -> Iterator[str]:
    parallel = config.parallel
    optimizer = config.optimizer.name
    widths = state_bytes_per_parameter(parallel, replicas=replicas, optimizer=optimizer)
    yield (
        f"{replicas * parallel.tensor} ranks = {replicas} data-parallel x {parallel.tensor} "
        f"tensor-parallel, ZeRO stage {parallel.zero_stage}, {parallel.precision}; "
        f"{_accumulation(parallel, replicas)} micro-batches a step"
    )
    yield f"MiB per rank {'weights':>10} {'gradients':>10} {'optimizer':>10} {'sum':>10}   on disk"
    for number in range(len(config.stages)):
        held = parameter_count(
            config.model,
            num_layers=config.layers_of(number),
            vocab_size=vocab_size,
            tensor=parallel.tensor,
        )
        sizes = [held * width / MIB for width in (*widths.values(), sum(widths.values()))]
        row = " ".join(f"{size:>10,.1f}" for size in sizes)
        disk = held * parallel.tensor * _disk_bytes_per_parameter(parallel, optimizer) / MIB
        yield f"stage {number:<6} {row} {disk:>9,.1f}"
    yield (
        "Bytes a parameter and rank: "
        + " + ".join(f"{width:g} {name}" for name, width in widths.items())
        + f" (fp32 master weights and {'two moments' if optimizer == 'adamw' else 'no moments'},"
    )
    yield "shared by ZeRO). Not counted: activations, logits, DeepSpeed's buffers."
    yield "On disk: one checkpoint, all ranks together."


def _accumulation(parallel: ParallelConfig, replicas: int) -> int:
    return parallel.global_batch // (parallel.micro_batch * replicas)


def _disk_bytes_per_parameter(parallel: ParallelConfig, optimizer: str) -> float:
    """Weights once, master weights and moments once, whatever the number of replicas."""
    widths = state_bytes_per_parameter(parallel, replicas=1, optimizer=optimizer)
    return widths["weights"] + widths["optimizer"]


def _growth(
    config: RunConfig, stage: int, *, pool: Sequence[Candidate], vocab_size: int
) -> Iterator[str]:
    source, target = config.layers_of(stage - 1), config.layers_of(stage)
    yield f"{source} -> {target} layers before stage {stage}; a pool of {len(pool)}"
    yield "layers from bottom to top, numbered from 1; * duplicate of, R random, z zero output"
    width = max(len(candidate.id) for candidate in pool)
    for candidate in pool:
        yield f"  {candidate.id:<{width}}  {format_layer_map(candidate.plan.layer_map)}"
    yield from _lag_cost(config, stage, candidates=len(pool), vocab_size=vocab_size)


def _lag_cost(config: RunConfig, stage: int, *, candidates: int, vocab_size: int) -> Iterator[str]:
    growth = config.growth_before(stage)
    if candidates == 1:
        yield "A pool of one: nothing is compared, no extra steps."
        return
    cost = search_cost(config, stage, candidates=candidates, vocab_size=vocab_size)
    run = training_flops(config, vocab_size=vocab_size)
    continuation = stage_flops(config, stage, vocab_size=vocab_size)
    yield (
        f"{_rule(config, stage, candidates)} = {cost.probe_steps:,} probe steps; the winner's "
        f"{cost.kept_steps} go on, so LAG costs"
    )
    yield (
        f"  {cost.extra_steps:,} extra steps = {cost.extra_steps / config.total_steps:.1%} of the "
        f"run's, {cost.extra_steps / config.stages[stage].steps:.1%} of the stage's that follows;"
    )
    yield (
        f"  {cost.training_flops:.3e} FLOPs of training = {cost.training_flops / run:.1%} of the "
        f"run's, {cost.training_flops / continuation:.1%} of the stage's;"
    )
    yield (
        f"  {cost.validation_flops:.3e} FLOPs in {cost.evaluations:,} evaluations = "
        f"{cost.validation_flops / run:.1%}."
    )
    if growth.rule == "halving" and not growth.exhaustive:
        yield (
            f"  More, up to {candidates} x {growth.last_rung} steps, where rankings are not yet "
            "stable at a rung; fewer evaluations of those that stop."
        )


def _rule(config: RunConfig, stage: int, candidates: int) -> str:
    """The rule in words, with who trains how far."""
    growth = config.growth_before(stage)
    if growth.exhaustive:
        return f"Exhaustive: {candidates} x {config.stages[stage].steps}"
    last = growth.last_rung
    if growth.lag == "auto":
        return f"Rule {growth.rule}, lag auto, at most {candidates} x {last}"
    if growth.rule == "lag":
        return f"Rule lag, lag {last}: {candidates} x {last}"
    parts = [
        f"{left} to step {rung}" for rung, left in planned_rungs(growth, candidates=candidates)
    ]
    return f"Rule halving, eta {growth.eta}: {', '.join(parts)}"


def _costs(
    config: RunConfig, pools: Mapping[int, Sequence[Candidate]], vocab_size: int
) -> dict[int, SearchCost]:
    return {
        stage: search_cost(config, stage, candidates=len(pool), vocab_size=vocab_size)
        for stage, pool in pools.items()
    }


def _searches(
    config: RunConfig, pools: Mapping[int, Sequence[Candidate]], *, vocab_size: int
) -> Iterator[str]:
    """What all searches cost together."""
    costs = _costs(config, pools, vocab_size)
    run = training_flops(config, vocab_size=vocab_size)
    columns = ("growth", "    layers", "candidates", "extra steps", "search FLOPs", "of run")
    yield " ".join(columns)
    for stage, cost in costs.items():
        layers = f"{config.layers_of(stage - 1)} -> {config.layers_of(stage)}"
        yield (
            f"{stage:>6} {layers:>10} {cost.candidates:>10} {cost.extra_steps:>11,} "
            f"{cost.flops:>12.3e} {cost.flops / run:>6.1%}"
        )
    extra = sum(cost.extra_steps for cost in costs.values())
    candidates = sum(cost.candidates for cost in costs.values())
    yield (
        f"{len(pools)} growth{'s' * (len(pools) > 1)}, {candidates} candidates: "
        f"{extra:,} extra steps = {extra / config.total_steps:.1%} of the run's"
    )


def _saving(
    config: RunConfig, pools: Mapping[int, Sequence[Candidate]], *, vocab_size: int
) -> Iterator[str]:
    """What growing and paths save, searches charged, if there are any."""
    layers = config.layers_of(len(config.stages) - 1)
    run = training_flops(config, vocab_size=vocab_size)
    per_token = training_flops_per_token(config, num_layers=layers, vocab_size=vocab_size)
    scratch = config.total_steps * tokens_per_step(config) * per_token
    if run == scratch and not pools:
        return
    yield (
        f"{config.total_steps:,} steps with {layers} layers from scratch: "
        f"{scratch:.3e} FLOPs. The stages take {run:.3e},"
    )
    searches = ""
    if pools:
        search = sum(cost.flops for cost in _costs(config, pools, vocab_size).values())
        searches = f"; with the searches {run + search:.3e}, {_less((run + search) / scratch)}"
    yield f"{_less(run / scratch)}{searches}."


def _less(share: float) -> str:
    return f"{1 - share:.1%} less" if share <= 1 else f"{share - 1:.1%} more"
