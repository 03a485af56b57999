"""The configurations that are shipped load, and their growths have a pool."""

from pathlib import Path

import pytest
from configuring import write

from lag_megatron.config import data_parallel_size, dump_config, load_config
from lag_megatron.growth.pool import build_pool

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configurations_load(path, tmp_path):
    run = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", dump_config(run))) == run
    if run.parallel.world_size is not None:
        data_parallel_size(run.parallel, world_size=run.parallel.world_size)
    for stage in range(1, len(run.stages)):
        source, target = run.layers_of(stage - 1), run.layers_of(stage)
        if target > source:
            pool = build_pool(
                run.growth_before(stage),
                source_layers=source,
                target_layers=target,
                seed=run.seed,
                init_std=run.model.init_std,
            )
            assert pool


def test_the_pool_of_the_paper_is_shipped():
    run = load_config(ROOT / "configs" / "gpt2_small_lag.yaml")
    growth = run.growth_before(1)
    pool = build_pool(growth, source_layers=12, target_layers=16, seed=1, init_std=0.02)
    assert len(pool) == 30
    assert (growth.lag, growth.rungs) == (200, (10, 25, 50, 100, 200))
