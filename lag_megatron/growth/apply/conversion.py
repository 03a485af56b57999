"""Checkpoints from any format that is read to any that is written, with growth on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lag_megatron.checkpoint.hf.tokenizer import TokenizerFile, tokenizer_files
from lag_megatron.checkpoint.hf.writer import Export, Precision
from lag_megatron.checkpoint.megatron.writer import megatron_job
from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.state.source import UNSHARDED, CheckpointSource
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.universal.writer import universal_job
from lag_megatron.checkpoint.writer.job import WriteJob
from lag_megatron.growth.apply.grow_zero import zero_job
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.plan import GrowthPlan

Format = Literal["zero", "universal", "megatron", "hf"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What becomes of a checkpoint.

    Attributes:
        source: what is read.
        to: the format to write.
        plan: how it grows on the way; None where it does not.
        topology: of the job that will load it; of no meaning to ``hf`` and ``megatron``.
        tokenizer: written with ``hf``.
        dtype: of the weights of ``hf``.
        max_shard_size: of a file of ``hf``.
        vocabulary: rows of the vocabulary to keep in ``hf``.
        stacked: whether the layers of ``megatron`` are stacked, or each has keys of its own.
    """

    source: CheckpointSource
    to: Format
    plan: GrowthPlan | None = None
    topology: Topology = UNSHARDED
    tokenizer: TokenizerFile | None = None
    dtype: Precision = "fp32"
    max_shard_size: int | str = "5GB"
    vocabulary: int | None = None
    stacked: bool = True

    def place(self, folder: Path) -> Path:
        """Where the checkpoint will lie when the user names ``folder``.

        ``hf`` is the folder itself; the others are a tag in it, as their loaders expect.
        """
        step = self.source.step
        if self.to == "hf":
            return folder
        if self.to == "megatron":
            return folder / f"iter_{step:07d}"
        name = self.source.path.resolve().name.removesuffix("_universal")
        if not name.startswith(("step", "global_step")):
            name = f"step{step:08d}"
        return folder / (f"{name}_universal" if self.to == "universal" else name)

    def order(self, target: Path) -> WriteJob:
        """What has to be written as the directory ``target``.

        Raises:
            LagError: whatever keeps it from being written, before a byte is.
        """
        self.source.check_every_file()
        if self.to == "zero":
            return zero_job(self.growth(self.topology), target)
        state = self.whole
        about = self._about
        if self.to == "universal":
            return universal_job(state, target, self.topology, about=about)
        if self.to == "megatron":
            return megatron_job(
                state,
                target,
                precision=self.topology.precision,
                about=about,
                stacked=self.stacked,
            )
        return self.export.order(target, about=about)

    def growth(self, topology: Topology) -> GrownState:
        """The plan under a topology."""
        if self.plan is None:
            return resharded(self.source, topology)
        return GrownState(self.source, self.plan, topology)

    @cached_property
    def whole(self) -> UnshardedState:
        """What is written, as if nothing was cut."""
        return unsharded_state(self._uncut)

    @cached_property
    def export(self) -> Export:
        """The directory of transformers."""
        return Export(
            self.whole,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            carried=tokenizer_files(self.source.path),
            vocabulary=self.vocabulary,
        )

    @cached_property
    def _uncut(self) -> GrownState:
        return self.growth(UNSHARDED)

    @property
    def _about(self) -> Mapping[str, Any]:
        about = dict(self._uncut.about)
        return about | ({"topology": None} if self.to in ("hf", "megatron") else {})


def unsharded_state(growth: GrownState) -> UnshardedState:
    """What a growth under the topology of one rank without ZeRO makes."""
    source = growth.source
    return UnshardedState(
        source.path, growth.draft, growth.filler(tensor_rank=0), source.require_sound
    )
