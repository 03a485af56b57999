"""The trainers that step.py compares, each a process of one rank."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from minimal_gpt import MinimalGpt
from torch import Tensor

from lag_megatron.checkpoint import tensor_map
from lag_megatron.config import RunConfig, parse_config
from lag_megatron.parallel import start_world, stop_world

LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and how many sequences a step has."""

    model: Mapping[str, Any]
    vocabulary: int
    batch: int


SHAPES = {
    "small": Shape(
        {"num_layers": 12, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 4,
         "num_query_groups": 4, "seq_length": 128, "positions": "learned", "norm": "layernorm",
         "activation": "gelu", "bias": True, "tied_embeddings": True},
        vocabulary=8192,
        batch=8,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """What all trainers are given."""

    shape: str
    dtype: str
    weights: Path
    device: str
    profile: bool

    @property
    def config(self) -> RunConfig:
        """The run that this project trains."""
        return _config(self.shape, self.dtype)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels of a step, both (b, s)."""
        shape = SHAPES[self.shape]
        draw = torch.Generator().manual_seed(step)
        size = (shape.batch, shape.model["seq_length"] + 1)
        text = torch.randint(shape.vocabulary, size, generator=draw).to(self.device)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


Step = Callable[[Tensor, Tensor, int], float]


def serve(name: str, job: Job, pipe: Connection) -> None:
    """Run as many steps as the pipe asks for and answer with seconds and losses; 0 ends it."""
    step, done = PEERS[name](job), 0
    pipe.send(name)
    while count := pipe.recv():
        seconds, losses = [], []
        for number in range(done, done + count):
            tokens, labels = job.batch(number)
            started = _now(job.device)
            losses.append(step(tokens, labels, number))
            seconds.append(_now(job.device) - started)
        done += count
        pipe.send((seconds, losses))
    if job.profile:
        _profile(name, job, step, done)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _profile(name: str, job: Job, step: Step, done: int) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if job.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for number in range(done, done + 3):
            step(*job.batch(number), number)
    order = f"self_{job.device}_time_total"
    print(f"{name}\n{profile.key_averages().table(sort_by=order, row_limit=18)}", flush=True)


def _config(shape: str, dtype: str) -> RunConfig:
    given = SHAPES[shape]
    return parse_config(
        {
            "model": {"family": "gpt", "dropout": 0.0, "norm_position": "pre", **given.model},
            "data": {"source": "stdlib"},
            "optimizer": {
                "lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY,
                "grad_clip": CLIP,
            },
            "parallel": {
                "zero_stage": 1, "micro_batch": given.batch, "global_batch": given.batch,
                "precision": dtype,
            },
            "stages": [{"steps": 1}],
        }
    )  # fmt: skip


def write_weights(shape: str, file: Path) -> None:
    """The weights that all start from, by Megatron-Core's names."""
    from lag_megatron.engine import Engine

    config, world = _config(shape, "fp32"), start_world(tensor=1)
    layers, vocabulary = config.model.num_layers, SHAPES[shape].vocabulary
    engine = Engine(config, world, num_layers=layers, vocab_size=vocabulary)
    torch.save({n: p.detach().cpu() for n, p in engine._engine.module.named_parameters()}, file)
    stop_world()


def ours(job: Job) -> Step:
    """This project's engine."""
    from lag_megatron.engine import Engine

    config, world = job.config, start_world(tensor=1)
    vocabulary = SHAPES[job.shape].vocabulary
    engine = Engine(config, world, num_layers=config.model.num_layers, vocab_size=vocabulary)

    def step(tokens: Tensor, labels: Tensor, number: int) -> float:
        batch = {
            "tokens": tokens,
            "labels": labels,
            "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
            "loss_mask": torch.ones(tokens.shape),
        }
        return engine.train_step([batch], step=number, lr=LR).loss

    return step


def stock(job: Job, *, spec: Any = None) -> Step:
    """Megatron-Core's GPT by its own local layers, under DeepSpeed ZeRO-1 with torch's AdamW."""
    import deepspeed
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from lag_megatron.model.random_state import seed_everywhere
    from lag_megatron.model.transformer import transformer_config
    from lag_megatron.model.without_cuda import run_megatron_without_cuda
    from lag_megatron.parallel import DeepSpeedGroups

    world = start_world(tensor=1)
    run_megatron_without_cuda()
    seed_everywhere(0)
    deepspeed.init_distributed()
    config, shape = job.config, SHAPES[job.shape]
    layers = config.model.num_layers
    model = GPTModel(
        config=transformer_config(config.model, config.parallel, num_layers=layers),
        transformer_layer_spec=spec or get_gpt_layer_local_spec(),
        vocab_size=shape.vocabulary,
        max_sequence_length=config.model.seq_length,
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        position_embedding_type="learned_absolute",
    )
    weights = torch.load(job.weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=_groups(model),
        mpu=DeepSpeedGroups(world),
        dist_init_required=False,
        config={
            "train_batch_size": shape.batch,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": job.dtype == "bf16"},
            "gradient_clipping": CLIP,
            "steps_per_print": 10**9,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LR, "betas": BETAS, "eps": EPS, "torch_adam": True},
            },
        },
    )

    length = config.model.seq_length
    future = torch.ones(1, 1, length, length, dtype=torch.bool, device=job.device).triu_(1)
    if spec is not None:
        future = None

    def step(tokens: Tensor, labels: Tensor, number: int) -> float:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        loss = engine(tokens, positions, future, labels=labels).mean()
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def stock_sdpa(job: Job) -> Step:
    """The same with torch's scaled dot product as its attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from lag_megatron.model import attention

    class Sdpa(attention.SDPACoreAttention):
        by_products = False

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = Sdpa
    return stock(job, spec=spec)


def hugging_face(job: Job) -> Step:
    """GPT-2 of transformers with torch's fused AdamW; bf16 by autocast, as its Trainer does."""
    import transformers

    from lag_megatron.checkpoint.hf_architecture import architecture_of

    model_config = job.config.model
    architecture = architecture_of(model_config)
    settings = architecture.settings(model_config, model_config.num_layers)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=SHAPES[job.shape].vocabulary, **settings)
    ).to(job.device)
    model.load_state_dict(_for_transformers(job), strict=False)
    model.tie_weights()
    optimizer = torch.optim.AdamW(_groups(model), lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step(tokens: Tensor, labels: Tensor, number: int) -> float:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def minimal(job: Job) -> Step:
    """A compiled GPT of one page: bf16 weights, fp32 masters, torch's fused AdamW."""
    model = MinimalGpt(job.config.model, SHAPES[job.shape].vocabulary)
    model.load_state_dict(_for_transformers(job), strict=False)
    masters = [p.detach().clone().to(job.device).requires_grad_() for p in model.parameters()]
    model.to(job.device, torch.bfloat16 if job.dtype == "bf16" else torch.float32)
    weights = list(model.parameters())
    decayed = [m for m in masters if m.dim() > 1]
    others = [m for m in masters if m.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip
    compiled = torch.compile(model)

    def step(tokens: Tensor, labels: Tensor, number: int) -> float:
        loss = compiled(tokens, labels)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return float(loss.detach())

    return step


PEERS: Mapping[str, Callable[[Job], Step]] = {
    "ours": ours,
    "stock": stock,
    "stock_sdpa": stock_sdpa,
    "hugging_face": hugging_face,
    "minimal": minimal,
}


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _for_transformers(job: Job) -> dict[str, Tensor]:
    model, weights = job.config.model, torch.load(job.weights)
    size = model.hidden_size // model.num_attention_heads
    heads = tensor_map.Heads(model.num_query_groups, size)
    rows = tensor_map.expand(
        tensor_map.GPT2,
        num_layers=model.num_layers,
        bias=model.bias,
        tied_embeddings=model.tied_embeddings,
    )
    return {
        name: part
        for row in rows
        for name, part in zip(
            row.transformers,
            tensor_map.to_transformers(row, weights[row.megatron], heads),
            strict=True,
        )
    }
