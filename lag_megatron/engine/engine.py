"""The DeepSpeed engine around one model shape: the only file that imports deepspeed."""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# DeepSpeed builds its CPU communication op with ninja; without the environment's bin folder on the
# PATH (the launcher called by its full path) that fails.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, DeepSpeed need not warn that it guessed

import deepspeed
from torch import Tensor

from lag_megatron.checkpoint.state.compatibility import (
    require_same_optimizer,
    require_same_parameters,
)
from lag_megatron.checkpoint.state.layout import Layout, Topology, make_layout
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.storage.integrity import require_sound
from lag_megatron.checkpoint.zero.file_names import files_of, files_of_rank
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.checkpoint.zero.writer import bytes_of
from lag_megatron.config import RunConfig
from lag_megatron.config.deepspeed import deepspeed_config
from lag_megatron.data.batch import on_device
from lag_megatron.distributed.world import DeepSpeedGroups, World, topology_of
from lag_megatron.engine.base_cache import KeptBase
from lag_megatron.engine.fused_zero_step import use_one_pass
from lag_megatron.engine.partial_step import partial_step
from lag_megatron.engine.reductions import doubles, gradient_norm, over_data, read
from lag_megatron.engine.state import LiveState
from lag_megatron.engine.step_result import StepResult
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.apply.grown_state import GrownState, resharded
from lag_megatron.growth.plan import GrowthPlan
from lag_megatron.model import build_model, labels_of, loss_sums, mean_loss
from lag_megatron.model.cuda_graphs import graph_layers
from lag_megatron.model.initialize import initialize_weights, mark_cut_parameters
from lag_megatron.model.parameter_groups import decay_split, make_optimizer
from lag_megatron.model.random_state import seed_everywhere, seed_step
from lag_megatron.planning.random_paths import LayerPath
from lag_megatron.run.compile_cache import clear_marks

Batch = dict[str, Tensor]
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
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.config, self.world, self.num_layers = config, world, num_layers
        settings = deepspeed_config(config, world_size=world.size)
        groups = DeepSpeedGroups(world)
        clear_marks()
        deepspeed.init_distributed()
        seed_everywhere(config.seed)
        with _sharded_construction(config, settings, groups):
            model = build_model(
                config.model, config.parallel, num_layers=num_layers, vocab_size=vocab_size
            )
        mark_cut_parameters(model)
        if config.parallel.cuda_graphs:
            graph_layers(model)
        if draw_weights:
            initialize_weights(model, config, world, num_layers=num_layers, gathered=self._gathered)
        # The learning rate is 0 until the first step sets it: DeepSpeed's 16-bit ZeRO-0 optimizer
        # takes a step while it is built.
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model, config.optimizer),
            config=settings,
            mpu=groups,
            dist_init_required=False,
        )
        stage = config.parallel.zero_stage
        if stage and config.optimizer.name == "adamw" and config.optimizer.one_pass:
            use_one_pass(self._engine.optimizer, stage=stage)
        self._forget_steps()
        self._new_layers: frozenset[int] = frozenset()

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
    def live(self) -> LiveState:
        """The tensors that hold this rank's part of the state."""
        return LiveState(self._engine, self.layout, self.topology, self.world.place)

    def destroy(self) -> None:
        """Free the model and its optimizer, so that a larger one can take their place."""
        self._engine.destroy()
        del self._engine
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
        world, engine, device = self.world, self._engine, self.world.device
        engine.train()
        seed_step(self.config.seed, step, world)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        # Nothing is read from the device before the step is on its way: the host runs ahead.
        counts = over_data(doubles(labels_of(batches), device), world)
        # DeepSpeed averages gradients over the replicas; this makes them a sum again.
        weights = (world.data_size / counts.clamp(min=1.0)).float()
        totals = torch.zeros_like(counts)
        norm = None
        slow = (self._new_layers, new_layers)
        freeze = self.config.raptr.update_skipped == "freeze"
        with partial_step(engine, lambda: self.live, slow=slow, path=path, freeze=freeze):
            for batch in batches:
                sums = loss_sums(engine, on_device(batch, device))
                engine.backward((sums * weights).sum(), scale_wrt_gas=False)
                if batch is batches[-1] and not self.config.parallel.zero_stage:
                    norm = gradient_norm(engine.module)  # DeepSpeed reports none without ZeRO
                engine.step()
                totals += sums.detach()
                del sums  # parameters' nodes outlive it otherwise, and with them their streams
        norm = engine.get_global_grad_norm() if norm is None else norm
        stops = doubles([float(stop_asked())], device)
        summed = over_data(torch.cat([totals, stops]), world)
        known = [] if norm is None else [torch.as_tensor(norm, dtype=torch.float64, device=device)]
        (*losses, asked), labels, *norms = read(summed, counts, *known)
        grad_norm = norms[0][0] if norms else None
        return StepResult(mean_loss(losses, labels), grad_norm, self._agree(asked))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[Batch]]) -> list[float]:
        """Loss in nats of each validation batch, given as this rank's parts: see train_step."""
        self._engine.eval()
        device = self.world.device
        sums, labels = [], []
        for parts in batches:
            losses = [loss_sums(self._engine, on_device(batch, device)).double() for batch in parts]
            sums.append(torch.stack(losses).sum(0))
            labels += labels_of(parts)
        counts = doubles(labels, device).view(len(sums), -1)
        both = over_data(torch.stack([torch.stack(sums), counts]), self.world).tolist()
        return [mean_loss(*pair) for pair in zip(*both, strict=True)]

    def save(self, folder: Path, tag: str, *, client_state: Mapping[str, Any]) -> None:
        """Write this state as DeepSpeed does, below ``folder / tag``; commit is the caller's."""
        names = [list(group) for group in self.parameter_groups()]
        lag = {**client_state, "num_layers": self.num_layers, "parameter_groups": names}
        self._engine.save_checkpoint(
            str(folder), tag=tag, client_state={"lag": lag}, save_latest=False
        )

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Take over the state of ``checkpoint`` (a tag folder) and return its client state.

        One of another number of ranks, ZeRO stage or tensor-parallel size is spread anew in place;
        DeepSpeed's own loader takes none.

        Raises:
            CheckpointError: if it is damaged, or holds other parameters, in another order or of
                other shapes; DeepSpeed itself would load all that without a word.
        """
        # Together: a rank that refused alone would leave the others waiting inside DeepSpeed.
        kept = self.world.from_each(lambda: self._require_fit(checkpoint))
        if not all(kept):
            growth = resharded(ZeroCheckpoint.open(checkpoint), self.topology)
            self.grow_from(growth)
            return growth.client_state
        path, client_state = self._engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
        if path is None:
            raise CheckpointError(f"{checkpoint}: DeepSpeed found no checkpoint there.")
        self._remember(client_state["lag"])
        return dict(client_state["lag"])

    def grow_from(self, growth: GrownState, base: KeptBase | None = None) -> None:
        """Become, in place, what a growth makes of its source, which may lie on any topology.

        The same as writing the grown checkpoint and loading it, bit for bit; nothing is written.
        ``base`` keeps the source for the next growth from it.

        Raises:
            CheckpointError: if the source is damaged, or grows into another model than this.
            PlanError: if the growth ends at another topology.
        """
        live = self.live
        self.world.from_each(lambda: live.require(growth))
        written = self.world.from_each(lambda: live.overwrite(growth, base))
        live.refresh(written=written[self.world.rank])
        self._remember(growth.client_state)

    def parameter_groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and this rank's shapes of the optimizer's parameters, by group, in flat order."""
        names = {id(p): name for name, p in self._engine.module.named_parameters()}
        return [
            {names[id(p)]: tuple(getattr(p, "ds_shape", p.shape)) for p in group}
            for group in self._trained
        ]

    def _forget_steps(self) -> None:
        """Undo the step counts of DeepSpeed's own construction, which would bias the moments."""
        optimizer = self._engine.optimizer
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"])

    def _remember(self, client_state: Mapping[str, Any]) -> None:
        """Which layers the last growth of the state that was taken over has added."""
        history = client_state.get("growth_history") or ()
        self._new_layers = GrowthPlan(**history[-1]).new_layers if history else frozenset()

    @property
    def _trained(self) -> list[list[torch.nn.Parameter]]:
        decayed, others = decay_split(self._engine.module)
        return [group for group in (decayed, others) if group]

    def _require_fit(self, checkpoint: Path) -> bool:
        """Refuse what cannot be taken over; whether it is spread as this engine is."""
        source, world = ZeroCheckpoint.open(checkpoint), self.world
        same = source.topology == self.topology
        if same:
            found = source.parameter_groups(world.tensor_rank)
            require_same_parameters(checkpoint, found, self.parameter_groups())
            require_same_optimizer(checkpoint, source.layout, self.layout)
            mine = files_of_rank(self.topology, **world.place)
        else:
            self.live.require(resharded(source, self.topology))
            mine = files_of(source.topology)[world.rank :: world.size]
        if manifest.is_committed(checkpoint):
            require_sound(checkpoint, mine)
        return same

    def _gathered(self, parameter: torch.nn.Parameter) -> Any:
        """Make a parameter whole while it is written; replicas then take replica 0's."""
        if self.config.parallel.zero_stage != 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)

    def _agree(self, stops: float) -> bool:
        # Tensor-parallel ranks may have been signalled at different steps.
        return self.world.any_rank(stops > 0) if self.world.tensor_size > 1 else stops > 0


def _sharded_construction(config: RunConfig, settings: dict[str, Any], groups: Any) -> Any:
    """Under ZeRO-3 each parameter is cut as soon as it exists, so no rank holds the model."""
    if config.parallel.zero_stage != 3:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(
        data_parallel_group=groups.get_data_parallel_group(),
        config_dict_or_path=settings,
        mpu=groups,
    )
