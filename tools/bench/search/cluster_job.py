"""What the growth event of a run asks of a cluster."""

from lag_megatron.config import GrowthConfig, RunConfig
from lag_megatron.planning.cost import parameter_count
from lag_megatron.planning.vocab_size import estimate_vocab_size
from lag_megatron.selection import planned_rungs
from lag_megatron.training.dry_run import growth_pools
from tools.bench.search.cluster_model import SearchJob


def job_of(config: RunConfig, number: int, growth: GrowthConfig) -> SearchJob:
    """Growth event ``number`` under the settings ``growth``; tensor parallelism is not modelled."""
    pool = growth_pools(config)[number]
    vocab_size, _ = estimate_vocab_size(config)
    rungs, before = [], -1
    for rung, count in planned_rungs(growth, candidates=len(pool)):
        evaluations = sum(before < step <= rung for step in growth.evaluation_steps())
        rungs.append((rung, count, evaluations))
        before = rung
    return SearchJob(
        rows=config.parallel.global_batch,
        length=config.model.seq_length,
        micro_rows=config.parallel.micro_batch,
        parameters=parameter_count(
            config.model, num_layers=config.layers_of(number), vocab_size=vocab_size
        ),
        evaluation_tokens=config.data.validation_tokens,
        rungs=tuple(rungs),
        parallel=config.parallel,
    )
