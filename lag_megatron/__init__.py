"""Landscape-aware growing of transformers on DeepSpeed and Megatron-Core.

``import lag_megatron as lag`` gives the functions of ``docs/api.md``.  It imports neither torch nor
DeepSpeed: each name brings its module when it is first used, so that every program starts quickly.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "CheckpointInfo": "lag_megatron.api",
    "convert": "lag_megatron.api",
    "grow": "lag_megatron.api",
    "inspect": "lag_megatron.api",
    "grow_engine": "lag_megatron.engine.grow_engine",
    "GrowthPlan": "lag_megatron.growth.plan",
    "Halving": "lag_megatron.search.ask_tell.search",
    "Lag": "lag_megatron.search.ask_tell.search",
    "Search": "lag_megatron.search.ask_tell.search",
    "Trial": "lag_megatron.search.ask_tell.search",
    "Winner": "lag_megatron.search.ask_tell.search",
    "pool": "lag_megatron.search.ask_tell.search",
    "CheckpointError": "lag_megatron.errors",
    "DeepSpeedVersionError": "lag_megatron.errors",
    "PlanError": "lag_megatron.errors",
    "RunError": "lag_megatron.errors",
    "UserError": "lag_megatron.errors",
}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
