"""The trainers that step.py compares, each a process of one rank."""

import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from minimal_gpt import MinimalGpt
from step_job import BETAS, CLIP, DECAY, EPS, LR, SHAPES, Job, weights_for_transformers
from torch import Tensor

from lag_megatron.engine import Engine
from lag_megatron.parallel import start_world

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


def ours(job: Job) -> Step:
    """This project's engine."""
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
    model.load_state_dict(weights_for_transformers(job), strict=False)
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
    model.load_state_dict(weights_for_transformers(job), strict=False)
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
