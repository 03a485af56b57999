"""A program of torch's modules under DeepSpeed alone: ``from plain_program import At, grow``."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from full_state import read_full
from torch import nn

from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.apply.grown_state import retarget
from lag_megatron.growth.plan import GrowthPlan

HIDDEN, INNER, VOCABULARY, LENGTH = 10, 14, 30, 6  # with 2 and 3 ranks, padding everywhere
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 3
CLIENT_STATE = {"epoch": 1, "rng_state": torch.arange(5), "args": {"lr": 0.01, "name": "run"}}
LAYERS = [(0, False), (0, True), (1, False), (1, True)]
GROW = GrowthPlan(
    operator="lag",
    options={"index": 0, "block_size": 1, "init": "duplicate"},
    source_layers=2,
    target_layers=4,
)


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mix.weight.requires_grad = False
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)
        self.register_buffer("gain", torch.tensor([0.3 + number]))

    def forward(self, x):
        inner = F.gelu(self.up(self.mix(self.norm(x))))
        return x + self.down(inner) * self.gain.to(x.dtype)  # buffers stay in fp32


class Plain(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.position = nn.Embedding(LENGTH, HIDDEN)
        self.position.weight.requires_grad = False
        self.layers = nn.ModuleList(Layer(number) for number in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("places", torch.arange(LENGTH))

    def forward(self, tokens):
        x = self.embed(tokens) + self.position(self.places)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@dataclass(frozen=True)
class At:
    """ZeRO stage, ranks, precision."""

    stage: int
    world: int
    precision: str = "fp32"
    wide_gradients: bool = False  # DeepSpeed's BF16_Optimizer

    def __str__(self):
        wide = "wide" if self.wide_gradients else ""
        return f"zero{self.stage}x{self.world}{self.precision}{wide}"

    def config(self):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.7,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.stage},
        }
        if self.precision == "fp16":  # so small that the scale changes within these steps
            options = {"initial_scale_power": 5, "loss_scale_window": 2, "hysteresis": 3}
            config["fp16"] = {"enabled": True, "min_loss_scale": 2, **options}
        elif self.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if self.wide_gradients:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    def read(self, folder):
        """Whole tensors of the trained parameters, and the step counters."""
        return read_full(
            folder,
            stage=self.stage,
            data_size=self.world,
            tensor_size=1,
            precision=self.precision,
        )


def build(at, layers):
    """The model under DeepSpeed, told only what a plain program tells it."""
    import deepspeed
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # slow on most processors, but right
    deepspeed.init_distributed("gloo")
    torch.manual_seed(7)
    model = Plain(layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=10)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=at.config()
    )
    return engine


def train(engine, steps):
    """The losses of some steps; every rank has a text of its own."""
    losses = []
    for step in steps:
        seed = torch.Generator().manual_seed(10 * step + engine.global_rank)
        text = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=seed)
        logits = engine(text[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def gathered(engine):
    """Every parameter of the forward pass, whole."""
    import deepspeed

    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=sharded):
        return {name: p.detach().clone() for name, p in parameters.items()}


def masters(optimizer):
    """The fp32 masters of a DeepSpeed optimizer, of any ZeRO stage."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    if hasattr(optimizer, "fp32_groups"):
        return [p for group in optimizer.fp32_groups for p in group]
    return [p for group in optimizer.param_groups for p in group["params"]]


def train_and_save(ways):
    """On each rank: one checkpoint after the other; their whole parameters."""
    found = []
    for at, folder in ways:
        engine = build(at, layers=2)
        train(engine, range(STEPS))
        engine.save_checkpoint(str(folder), "source", client_state=CLIENT_STATE)
        found.append(gathered(engine))
        engine.destroy()
    return found


def load_and_save(at, folder, layers):
    """On each rank: load what was grown, save it again and train on."""
    engine = build(at, layers)
    path, client_state = engine.load_checkpoint(str(folder), "grown")
    assert path is not None
    # DeepSpeed returns entries of its own among them, which would replace the new ones.
    client_state = {key: client_state[key] for key in (*CLIENT_STATE, "lag")}
    engine.save_checkpoint(str(folder), "again", client_state=client_state, save_latest=False)
    parameters = gathered(engine)
    return client_state, parameters, train(engine, [STEPS])


def grow(source, target, plan, after):
    topology = retarget(
        ZeroCheckpoint.open(source).topology,
        world_size=after.world,
        zero_stage=after.stage,
        precision=after.precision,
    )
    grow_checkpoint(source, target, plan, topology=topology, workers=2)


def load(folder, pattern):
    """The first file's objects, as DeepSpeed's own classes."""
    return torch.load(min(folder.glob(pattern)), weights_only=False)
