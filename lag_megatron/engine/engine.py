"""The DeepSpeed engine around one model shape: steps, evaluation, checkpoints, growth in place."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lag_megatron.checkpoint.state.compatibility import (
    require_same_optimizer,
    require_same_parameters,
)
from lag_megatron.checkpoint.state.finite import all_finite, nonfinite_in
from lag_megatron.checkpoint.state.layout import Layout, Topology, make_layout
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import require_sound
from lag_megatron.checkpoint.zero.file_names import files_of, files_of_rank
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.checkpoint.zero.writer import bytes_of
from lag_megatron.config import ModelConfig, RunConfig
from lag_megatron.data.batch import Batch, to_device
from lag_megatron.distributed.world import World, topology_of
from lag_megatron.engine.base_cache import BaseCache
from lag_megatron.engine.build import build_deepspeed_engine
from lag_megatron.engine.deepspeed_adapter import PartitionedAdapter, adapt, full_shape
from lag_megatron.engine.fused_zero_step import use_fused_step
from lag_megatron.engine.partial_step import partial_step
from lag_megatron.engine.reductions import (
    float64_tensor,
    gradient_norm,
    sum_over_data_parallel,
    to_host,
)
from lag_megatron.engine.state import EngineState
from lag_megatron.engine.step_result import StepResult
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.model import labels_of, loss_sums, mean_loss
from lag_megatron.model.parameter_groups import split_by_decay
from lag_megatron.model.random_state import seed_step
from lag_megatron.planning.random_paths import LayerPath

Flag = Callable[[], bool]


class Engine:
    """A model of one depth under DeepSpeed, on all ranks of the world.

    Building it is a collective call.  Weights depend on ``config.seed`` and the shape alone; an
    engine whose state will be loaded need not draw any.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        num_layers: int,
        vocab_size: int,
        draw_weights: bool = True,
    ) -> None:
        self.config, self.world, self.num_layers = config, world, num_layers
        self.deepspeed_engine = build_deepspeed_engine(
            config,
            world,
            num_layers=num_layers,
            vocab_size=vocab_size,
            draw_weights=draw_weights,
        )
        self._adapter = adapt(
            self.deepspeed_engine,
            zero_stage=config.parallel.zero_stage,
            precision=config.parallel.precision,
        )
        one_pass = config.optimizer.name == "adamw" and config.optimizer.one_pass
        if one_pass and isinstance(self._adapter, PartitionedAdapter):
            use_fused_step(self._adapter)
        self._reset_step_counts()
        self._new_layers: frozenset[int] = frozenset()

    @property
    def model_config(self) -> ModelConfig:
        """The configuration of the model, whose depth is that of the first stage."""
        return self.config.model

    @property
    def topology(self) -> Topology:
        """How this engine's state is spread over ranks."""
        return topology_of(self.config, self.world)

    @property
    def layout(self) -> Layout:
        """Where the state of each parameter lies."""
        return make_layout(self.parameter_groups(), self.topology, self.config.optimizer.name)

    @property
    def bytes_on_disk(self) -> int:
        """Size of a checkpoint of this engine, all ranks together."""
        return bytes_of(self.topology, self.layout)

    @property
    def state(self) -> EngineState:
        """The tensors that hold this rank's part of the state."""
        return EngineState(self._adapter, self.layout, self.topology, self.world.coords)

    @property
    def module(self) -> torch.nn.Module:
        """The model that DeepSpeed runs."""
        module: torch.nn.Module = self.deepspeed_engine.module
        return module

    def destroy(self) -> None:
        """Free the model and its optimizer, so that a larger one can take their place."""
        self.deepspeed_engine.destroy()
        del self.deepspeed_engine, self._adapter
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        lr: float,
        new_layers: float = 1.0,
        path: LayerPath | None = None,
        stop_asked: Flag = bool,
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches of global batch ``step``.

        Each part of the loss (see :func:`lag_megatron.model.loss_sums`) is its sum over the labels
        of the global batch divided by their number, so that accumulation, world size and masking do
        not change it.  Layers that the last growth added take ``new_layers`` times the rate ``lr``.
        With a ``path`` its layers alone are trained.  ``stop_asked`` is looked at last.
        """
        world, engine, device = self.world, self.deepspeed_engine, self.world.device
        engine.train()
        seed_step(self.config.seed, step, world)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        # Nothing is read from the device before the step is on its way: the host runs ahead.
        counts = sum_over_data_parallel(float64_tensor(labels_of(batches), device), world)
        # DeepSpeed averages gradients over the replicas; this makes them a sum again.
        weights = (world.data_size / counts.clamp(min=1.0)).float()
        totals = torch.zeros_like(counts)
        norm = None
        scaled = (self._new_layers, new_layers)
        freeze = self.config.raptr.update_skipped == "freeze"
        with partial_step(
            self._adapter, lambda: self.state, scaled=scaled, path=path, freeze=freeze
        ):
            for batch in batches:
                sums = loss_sums(engine, to_device(batch, device))
                engine.backward((sums * weights).sum(), scale_wrt_gas=False)
                if batch is batches[-1] and not self.config.parallel.zero_stage:
                    norm = gradient_norm(engine.module)  # DeepSpeed reports none without ZeRO
                engine.step()
                totals += sums.detach()
                del sums  # parameters' nodes outlive it otherwise, and with them their streams
        norm = engine.get_global_grad_norm() if norm is None else norm
        stops = float64_tensor([float(stop_asked())], device)
        summed = sum_over_data_parallel(torch.cat([totals, stops]), world)
        known = [] if norm is None else [torch.as_tensor(norm, dtype=torch.float64, device=device)]
        (*losses, stops_asked), labels, *norms = to_host(summed, counts, *known)
        grad_norm = norms[0][0] if norms else None
        return StepResult(mean_loss(losses, labels), grad_norm, self._any_tensor_rank(stops_asked))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[Batch]]) -> list[float]:
        """Loss in nats of each validation batch, given as this rank's parts: see train_step."""
        self.deepspeed_engine.eval()
        device = self.world.device
        sums, labels = [], []
        for parts in batches:
            losses = [
                loss_sums(self.deepspeed_engine, to_device(batch, device)).double()
                for batch in parts
            ]
            sums.append(torch.stack(losses).sum(0))
            labels += labels_of(parts)
        counts = float64_tensor(labels, device).view(len(sums), -1)
        both = sum_over_data_parallel(torch.stack([torch.stack(sums), counts]), self.world).tolist()
        return [mean_loss(*pair) for pair in zip(*both, strict=True)]

    def save(self, folder: Path, tag: str, *, client_state: Mapping[str, Any]) -> None:
        """Write this state as DeepSpeed does, below ``folder / tag``; commit is the caller's."""
        names = [list(group) for group in self.parameter_groups()]
        lag = {**client_state, "num_layers": self.num_layers, "parameter_groups": names}
        self.deepspeed_engine.save_checkpoint(
            str(folder), tag=tag, client_state={"lag": lag}, save_latest=False
        )

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load the state of ``checkpoint`` (a tag folder) and return its client state.

        One of another number of ranks, ZeRO stage or tensor-parallel size is resharded in place,
        which DeepSpeed's own loader cannot do.

        Raises:
            CheckpointError: if it is damaged, or holds other parameters, in another order or of
                other shapes, which DeepSpeed itself would load without a word, or has NaN or
                infinities.
        """
        # Together: a rank that refused alone would leave the others waiting inside DeepSpeed.
        same_topology = self.world.run_on_all_ranks(lambda: self._require_loadable(checkpoint))
        if not all(same_topology):
            growth = resharded(ZeroCheckpoint.open(checkpoint), self.topology)
            self.grow_from(growth)
            return growth.client_state
        path, client_state = self.deepspeed_engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
        if path is None:
            raise CheckpointError(f"{checkpoint}: DeepSpeed found no checkpoint there.")
        self.world.run_on_all_ranks(lambda: self._require_finite(checkpoint))
        self._set_new_layers(client_state["lag"])
        return dict(client_state["lag"])

    def grow_from(self, growth: GrownState, base: BaseCache | None = None) -> None:
        """Overwrite the state with what a growth makes of its source, which may have any topology.

        The same as writing the grown checkpoint and loading it, bit for bit; nothing is written.
        ``base`` caches the source for the next growth from it.

        Raises:
            CheckpointError: if the source is damaged, or grows into another model than this.
            PlanError: if the growth ends at another topology.
        """
        state = self.state
        self.world.run_on_all_ranks(lambda: state.require_compatible(growth))
        written = self.world.run_on_all_ranks(lambda: state.overwrite(growth, base))
        state.sync_weights(written=written[self.world.rank])
        self._set_new_layers(growth.client_state)

    def parameter_groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and this rank's shapes of the optimizer's parameters, by group, in flat order."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        return [{names[id(p)]: full_shape(p) for p in group} for group in self._trained]

    def _reset_step_counts(self) -> None:
        """Undo the steps of DeepSpeed's own construction, whose count would bias the moments."""
        for state in self._adapter.torch_optimizer.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"])

    def _set_new_layers(self, client_state: Mapping[str, Any]) -> None:
        """Set which layers are new: those that the last growth of a loaded state has added."""
        history = client_state.get("growth_history") or ()
        self._new_layers = GrowthPlan(**history[-1]).new_layers if history else frozenset()

    @property
    def _trained(self) -> list[list[torch.nn.Parameter]]:
        decayed, others = split_by_decay(self.module, shape_of=full_shape)
        return [group for group in (decayed, others) if group]

    def _require_finite(self, checkpoint: Path) -> None:
        """Refuse a loaded state with NaN or infinities in this rank's part."""
        layouts, rank = self.layout.states, self.world.tensor_rank
        for region, _, values in self.state.regions():
            if not all_finite(values):
                shapes = layouts[region.state].shapes
                for found in nonfinite_in(values, region, shapes, tensor_rank=rank):
                    raise CheckpointError(
                        f"{checkpoint}: {found}. Training cannot go on from such a state: take an "
                        "older checkpoint."
                    )

    def _require_loadable(self, checkpoint: Path) -> bool:
        """Refuse a checkpoint of another model; returns whether it has this engine's topology."""
        source, world = ZeroCheckpoint.open(checkpoint), self.world
        same = source.topology == self.topology
        if same:
            found = source.parameter_groups(world.tensor_rank)
            require_same_parameters(checkpoint, found, self.parameter_groups())
            require_same_optimizer(checkpoint, source.layout, self.layout)
            mine = files_of_rank(self.topology, **world.coords)
        else:
            self.state.require_compatible(resharded(source, self.topology))
            mine = files_of(source.topology)[world.rank :: world.size]
        if manifest.is_committed(checkpoint):
            require_sound(checkpoint, mine)
        return same

    def _any_tensor_rank(self, stops: float) -> bool:
        # Tensor-parallel ranks may have been signalled at different steps.
        return self.world.any_rank(stops > 0) if self.world.tensor_size > 1 else stops > 0
