"""What a search and a checkpoint need of an engine, so that another trainer can bring its own.

:class:`lag_megatron.engine.engine.Engine` is the one on DeepSpeed.  All methods but
:meth:`ShardedState.write` are collective over the engine's world.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.config import ModelConfig
from lag_megatron.distributed.world import World
from lag_megatron.engine.base_cache import BaseCache
from lag_megatron.growth.apply.grown_state import GrownState


class ShardedState(Protocol):
    """One rank's part of a training state."""

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 weights, which may be written to; they stay where they are."""

    def sync_weights(self) -> None:
        """Bring the weights that the model computes with up to the masters, on all ranks."""

    def write(
        self, folder: Path, growth: GrownState, *, client_state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write this rank's files of a state that began as ``growth``; their manifest entries."""


class SaveableEngine(Protocol):
    """An engine whose state :func:`lag_megatron.engine.save.save_engine` makes a checkpoint of."""

    @property
    def world(self) -> World:
        """The ranks that share the state."""

    @property
    def topology(self) -> Topology:
        """How the state is sharded over them."""

    @property
    def model_config(self) -> ModelConfig:
        """The model, for the checkpoint's description."""

    @property
    def bytes_on_disk(self) -> int:
        """Size of a checkpoint, all ranks together."""

    @property
    def state(self) -> ShardedState:
        """This rank's part of the state."""

    def save(self, folder: Path, tag: str, *, client_state: Mapping[str, Any]) -> None:
        """Write the state below ``folder / tag`` in DeepSpeed's format, without a manifest."""


class SearchEngine(SaveableEngine, Protocol):
    """An engine of a growth event's target depth, whose state candidates take turns in."""

    def grow_from(self, growth: GrownState, base: BaseCache | None = None) -> None:
        """Overwrite the state with what a growth makes of its source, which ``base`` caches."""

    def destroy(self) -> None:
        """Free the model and its optimizer."""
