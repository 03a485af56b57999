"""The pool of a growth event: every candidate that the configuration asks for."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lag_megatron.config import GrowthConfig, PoolConfig, RunConfig
from lag_megatron.config.schema.param_names import parse_param_names
from lag_megatron.config.schema.raptr import Lengths
from lag_megatron.errors import PlanError
from lag_megatron.growth.operators.layer_map import feasible_block_sizes, feasible_indices
from lag_megatron.growth.plan import GrowthPlan


@dataclass(frozen=True, slots=True)
class Candidate:
    """One growth plan of a pool.

    Attributes:
        id: names its folder and its curves.
        plan: the growth plan.
        path_length: of the stage that follows (Random Path Training), if candidates differ in it.
    """

    id: str
    plan: GrowthPlan
    path_length: Lengths | None = None

    def describe(self) -> dict[str, Any]:
        """The candidate's entry in ``pool.json``."""
        plan = self.plan
        return {
            "id": self.id,
            "operator": plan.operator,
            **plan.options,
            "moments": plan.moments,
            "source_layers": plan.source_layers,
            "target_layers": plan.target_layers,
            "layer_map": [
                {"source": o.source, "new": o.is_new, "init": o.init, "scale": o.branch_scale}
                | ({"silent": True} if o.zero_norms else {})
                for o in plan.layer_map
            ],
            **({} if self.path_length is None else {"path_length": self.path_length}),
            "digest": plan.digest,
        }


def growth_pools(config: RunConfig) -> dict[int, tuple[Candidate, ...]]:
    """The pool before each stage that grows, by the stage's number.

    Raises:
        PlanError: if a growth is impossible.
    """
    return {
        stage: growth_pool(config, stage)
        for stage in range(1, len(config.stages))
        if config.has_event(stage)
    }


def growth_pool(config: RunConfig, stage: int) -> tuple[Candidate, ...]:
    """The pool of the growth event before ``stage``.

    Raises:
        PlanError: if the growth is impossible.
    """
    return build_pool(
        config.growth_before(stage),
        source_layers=config.layers_of(stage - 1),
        target_layers=config.layers_of(stage),
        seed=config.seed,
        init_std=config.model.init_std,
    )


def build_pool(
    growth: GrowthConfig, *, source_layers: int, target_layers: int, seed: int, init_std: float
) -> tuple[Candidate, ...]:
    """All candidates for growing ``source_layers`` to ``target_layers``, in a fixed order.

    Raises:
        PlanError: if one of them is impossible, or the pool is empty.
    """

    names = None
    if growth.names is not None:
        names = parse_param_names(growth.names, where="growth.names")

    def plan(operator: str, options: dict[str, object]) -> GrowthPlan:
        return GrowthPlan(
            operator=operator,
            options=options,
            source_layers=source_layers,
            target_layers=target_layers,
            moments=growth.moments,
            seed=seed,
            init_std=init_std,
            names=names,
        )

    pool = growth.pool
    if pool.operator == "lag":
        grown = [
            Candidate(id_, plan("lag", options))
            for id_, options in _lag_options(pool, source_layers, target_layers)
        ]
    else:
        grown = [Candidate(pool.operator, plan(pool.operator, dict(pool.options)))]
    if not grown:
        raise PlanError(
            "the pool is empty: give growth.pool at least one index, block, init and scale."
        )
    if pool.path_length:
        grown = [
            Candidate(f"{candidate.id}-p{_format_length(length)}", candidate.plan, length)
            for candidate, length in itertools.product(grown, pool.path_length)
        ]
    ids = [candidate.id for candidate in grown]
    if len(set(ids)) < len(ids):
        raise PlanError(f"two candidates of the pool have one name: {', '.join(ids)}.")
    return tuple(grown)


def _format_length(length: Lengths) -> str:
    return ".".join(map(str, length)) if isinstance(length, tuple) else str(length)


def _lag_options(
    pool: PoolConfig, source_layers: int, target_layers: int
) -> Iterator[tuple[str, dict[str, object]]]:
    """Ids and options of the product; a scale of 1 is the default and is left out."""
    indices = _chosen(pool.index, feasible_indices(source_layers, target_layers))
    sizes = _chosen(pool.block_size, feasible_block_sizes(source_layers, target_layers))
    inits, scales = dict.fromkeys(pool.init), dict.fromkeys(pool.scale)
    for index, size, init, scale in itertools.product(indices, sizes, inits, scales):
        id_ = f"i{index}-b{size}-{init}"
        options: dict[str, object] = {"index": index, "block_size": size, "init": init}
        if scale == 1:
            yield id_, options
        else:
            yield f"{id_}-s{str(scale).removesuffix('.0')}", {**options, "scale": scale}


def _chosen(wanted: str | int | tuple[int, ...], feasible: Iterable[int]) -> Iterable[int]:
    if isinstance(wanted, str):
        return feasible if wanted == "all" else [value for value in feasible if value % 2 == 0]
    return (wanted,) if isinstance(wanted, int) else dict.fromkeys(wanted)
