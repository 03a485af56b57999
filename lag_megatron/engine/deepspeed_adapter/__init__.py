"""The one place that knows DeepSpeed's private attributes, behind names of this project.

Each ZeRO stage keeps its state under other attributes.  An adapter gives them one interface: fp32
masters, the weights that follow them, counters, loss scale, and the parts of an optimizer step.
What DeepSpeed documents (``initialize``, ``backward``, ``step``, ``save_checkpoint``,
``get_global_grad_norm``, ...) needs no adapter.

========== ================== =======================================================
stage      adapter            a rank's fp32 masters
========== ================== =======================================================
0, fp32    PlainAdapter       the parameters
0, 16 bits MixedAdapter       a copy of each parameter
1, 2       Zero12Adapter      one flat buffer for each parameter group
3          Zero3Adapter       one flat buffer for each of DeepSpeed's sub-groups
========== ================== =======================================================
"""

from typing import Any

from lag_megatron.engine.deepspeed_adapter.base import DeepSpeedAdapter
from lag_megatron.engine.deepspeed_adapter.initialized import (
    optimizer_kind,
    place_of,
    require_adaptable,
)
from lag_megatron.engine.deepspeed_adapter.partitioned import PartitionedAdapter
from lag_megatron.engine.deepspeed_adapter.unpartitioned import MixedAdapter, PlainAdapter
from lag_megatron.engine.deepspeed_adapter.zero3 import Zero3Adapter, full_shape
from lag_megatron.engine.deepspeed_adapter.zero12 import Zero12Adapter

ADAPTERS: tuple[type[DeepSpeedAdapter], ...] = (
    PlainAdapter,
    MixedAdapter,
    Zero12Adapter,
    Zero3Adapter,
)

__all__ = [
    "ADAPTERS",
    "DeepSpeedAdapter",
    "PartitionedAdapter",
    "adapt",
    "full_shape",
    "optimizer_kind",
    "place_of",
    "require_adaptable",
]


def adapt(engine: Any, *, zero_stage: int, precision: str) -> DeepSpeedAdapter:
    """The adapter of an initialized DeepSpeed engine.

    Raises:
        DeepSpeedVersionError: if the installed DeepSpeed lacks an attribute that it uses.
    """
    if zero_stage == 3:
        return Zero3Adapter(engine)
    if zero_stage:
        return Zero12Adapter(engine)
    return PlainAdapter(engine) if precision == "fp32" else MixedAdapter(engine)
