"""Conversion of a checkpoint to another format, with or without growth."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lag_megatron.checkpoint.families.roles import foreign_name
from lag_megatron.checkpoint.hf.tokenizer import TokenizerFile, tokenizer_files
from lag_megatron.checkpoint.hf.trained_model import with_megatron_names
from lag_megatron.checkpoint.hf.writer import Export, Precision
from lag_megatron.checkpoint.megatron.writer import megatron_job
from lag_megatron.checkpoint.state.layout import Topology
from lag_megatron.checkpoint.state.source import UNSHARDED, CheckpointSource
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.universal.writer import universal_job
from lag_megatron.checkpoint.writer.job import WriteJob
from lag_megatron.growth.apply.grow_zero import zero_job
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.apply.trainer_folder import TrainerFiles, trainer_files
from lag_megatron.growth.plan import GrowthPlan

Format = Literal["zero", "universal", "megatron", "hf"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion: the source, the format to write and its options.

    Attributes:
        source: the checkpoint to read.
        to: the format to write.
        plan: the growth plan, if it is to be grown.
        topology: of the training that will load it; of no meaning to ``hf``, and to ``megatron``
            for its precision alone.
        tokenizer: written with ``hf``.
        dtype: of the weights of ``hf``.
        max_shard_size: of a file of ``hf``.
        vocabulary: rows of the vocabulary to keep in ``hf``; of ``megatron`` those with padding,
            if the source has transformers' names.
        allow_nonfinite: go on where values of the source are NaN or infinite.
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
    allow_nonfinite: bool = False
    stacked: bool = True

    def target_dir(self, folder: Path) -> Path:
        """The directory to write when the user names ``folder``.

        For ``hf`` it is the folder itself, for the others a tag in it, as their loaders expect.
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

    def job(self, target: Path) -> WriteJob:
        """The job that writes the directory ``target``.

        Raises:
            LagError: if the conversion is not possible; nothing is written then.
        """
        self.source.check_every_file()
        if self.to == "zero":
            return zero_job(self.grown(self.topology), target)
        state = self.unsharded
        metadata = self._metadata
        if self.to == "universal":
            job = universal_job(state, target, self.topology, metadata=metadata)
            return replace(job, beside=self.trainer_files(target).write)
        if self.to == "megatron":
            return megatron_job(
                state,
                target,
                precision=self.topology.precision,
                metadata=metadata,
                stacked=self.stacked,
            )
        return self.export.job(target, metadata=metadata)

    def trainer_files(self, target: Path) -> TrainerFiles:
        """The files that go beside the tag directory ``target``, and those that do not."""
        if self.to not in ("zero", "universal"):
            return TrainerFiles({}, ())
        return trainer_files(self.grown(self.topology), target)

    def grown(self, topology: Topology) -> GrownState:
        """The grown state under a topology; without a plan, the resharded source."""
        if self.plan is None:
            return resharded(self.source, topology, allow_nonfinite=self.allow_nonfinite)
        return GrownState(self.source, self.plan, topology, self.allow_nonfinite)

    @cached_property
    def unsharded(self) -> UnshardedState:
        """The state to write, unsharded; Megatron's and transformers' have Megatron's names."""
        state = unsharded_state(self._unsharded_grown)
        is_named = self.to in ("zero", "universal") or foreign_name(state.shapes) is None
        if is_named or state.spec.layout.optimizer != "adamw":  # of others no moments are known
            return state
        rows = self.vocabulary if self.to == "megatron" else None  # an export drops the padding
        named = with_megatron_names(state, vocab_size=rows)
        return unsharded_state(resharded(named, UNSHARDED, allow_nonfinite=self.allow_nonfinite))

    @cached_property
    def export(self) -> Export:
        """The export to a transformers directory."""
        return Export(
            self.unsharded,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            carried=tokenizer_files(self.source.path),
            vocabulary=self.vocabulary,
        )

    @cached_property
    def _unsharded_grown(self) -> GrownState:
        return self.grown(UNSHARDED)

    @property
    def _metadata(self) -> Mapping[str, Any]:
        metadata = dict(self._unsharded_grown.metadata)
        return metadata | ({"topology": None} if self.to in ("hf", "megatron") else {})


def unsharded_state(grown: GrownState) -> UnshardedState:
    """The unsharded state of a grown state under the topology ``UNSHARDED``."""
    source = grown.source
    return UnshardedState(
        source.path, grown.spec, grown.filler(tensor_rank=0), source.require_sound
    )
