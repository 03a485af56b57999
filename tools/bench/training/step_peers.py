"""The trainers that step.py compares, each a process of one rank."""

import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.hf.architecture import architecture_of
from lag_megatron.distributed.world import start_world, stop_world
from lag_megatron.engine.engine import Engine
from tools.bench.training.minimal_gpt import MinimalGpt
from tools.bench.training.step_job import (
    BETAS,
    CLIP,
    DECAY,
    EPS,
    SHAPES,
    StepJob,
    take_weights,
    weights_for_transformers,
)

Batch = dict[str, Tensor]
Step = Callable[[Batch, int], float]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def serve(name: str, job: StepJob, pipe: Connection) -> None:
    """Run as many steps as the pipe asks for and answer with seconds and losses; 0 ends it."""
    step, done = PEERS[name](job), 0
    pipe.send(name)
    while count := pipe.recv():
        seconds, losses = [], []
        for number in range(done, done + count):
            batch = {name: tensor.to(job.device) for name, tensor in job.batch(number).items()}
            started = _now(job.device)
            losses.append(step(batch, number))
            seconds.append(_now(job.device) - started)
        done += count
        pipe.send((seconds, losses))
    if job.profile:
        _profile(name, job, step, done)
    stop_world()


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: str, dtype: str) -> float:
    """Operations a second of products of large matrices, the best of some, as a step is timed."""
    torch.set_num_threads(1)
    size, kind = (2048, 8192)[device == "cuda"], DTYPES[dtype]
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = _now(device)
        left @ right
        seconds.append(_now(device) - started)
    return 2.0 * size**3 / min(seconds)


def _profile(name: str, job: StepJob, step: Step, done: int) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if job.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for number in range(done, done + 3):
            step({name: t.to(job.device) for name, t in job.batch(number).items()}, number)
    order = f"self_{job.device}_time_total"
    print(f"{name}\n{profile.key_averages().table(sort_by=order, row_limit=18)}", flush=True)


def ours(job: StepJob) -> Step:
    """This project's engine."""
    config, world = job.config, start_world(tensor=1)
    layers, vocabulary = config.model.num_layers, SHAPES[job.shape].vocabulary
    engine = Engine(config, world, num_layers=layers, vocab_size=vocabulary, draw_weights=False)
    take_weights(engine, job.weights)

    def step(batch: Batch, number: int) -> float:
        return engine.train_step([batch], step=number, lr=job.lr).loss

    return step


def stock(job: StepJob, *, attention: type | None = None) -> Step:
    """Megatron-Core's model by its own local layers, under DeepSpeed ZeRO-1 with torch's AdamW."""
    import deepspeed

    from lag_megatron.distributed.world import DeepSpeedGroups
    from lag_megatron.model.cpu_shims import install_cpu_shims
    from lag_megatron.model.random_state import seed_everywhere

    world = start_world(tensor=1)
    install_cpu_shims()
    seed_everywhere(0)
    deepspeed.init_distributed()
    model, loss_of = (_stock_bert if job.config.model.family == "bert" else _stock_gpt)(
        job, attention
    )
    weights = torch.load(job.weights, mmap=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=_groups(model),
        mpu=DeepSpeedGroups(world),
        dist_init_required=False,
        config={
            "train_batch_size": SHAPES[job.shape].batch,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": job.dtype == "bf16"},
            "gradient_clipping": CLIP,
            "steps_per_print": 10**9,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": job.lr, "betas": BETAS, "eps": EPS, "torch_adam": True},
            },
        },
    )

    def step(batch: Batch, number: int) -> float:
        loss = loss_of(engine, batch)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


Stock = tuple[torch.nn.Module, Callable[[Any, Batch], Tensor]]


def _stock_gpt(job: StepJob, attention: type | None) -> Stock:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = job.config.model
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm"
    )
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
    model = GPTModel(
        config=_stock_config(job),
        transformer_layer_spec=spec,
        vocab_size=SHAPES[job.shape].vocabulary,
        max_sequence_length=config.seq_length,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope" if config.positions == "rope" else "learned_absolute",
    )
    shape = (1, 1, config.seq_length, config.seq_length)
    future = torch.ones(shape, dtype=torch.bool, device=job.device).triu_(1)
    mask = future if attention is None else None

    def loss_of(engine: Any, batch: Batch) -> Tensor:
        losses = engine(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
        return losses.mean()

    return model, loss_of


def _stock_bert(job: StepJob, attention: type | None) -> Stock:
    """Its head computes all positions, and the loss of those that are not predicted counts 0."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    if attention is not None:
        raise SystemExit("stock_sdpa: its check of BERT's mask asks for Transformer Engine.")
    config = job.config.model
    model = BertModel(
        config=_stock_config(job),
        num_tokentypes=config.token_types,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=SHAPES[job.shape].vocabulary,
        max_sequence_length=config.seq_length,
        share_embeddings_and_output_weights=config.tied_embeddings,
        add_binary_head=False,
    )

    def loss_of(engine: Any, batch: Batch) -> Tensor:
        places, tokens = batch["masked_positions"], batch["tokens"]
        labels = torch.zeros_like(tokens).scatter_(1, places, batch["labels"])
        weights = torch.zeros_like(tokens, dtype=torch.float32)
        weights.scatter_(1, places, batch["loss_mask"])
        whole, kinds = torch.ones_like(tokens), batch["token_types"]
        losses, _ = engine(tokens, whole, kinds, lm_labels=labels)
        return (losses * weights).sum() / weights.sum()

    return model, loss_of


def _stock_config(job: StepJob) -> Any:
    from lag_megatron.model.transformer import transformer_config

    config = job.config
    return transformer_config(config.model, config.parallel, num_layers=config.model.num_layers)


def stock_sdpa(job: StepJob) -> Step:
    """The same with torch's scaled dot product as its attention."""
    from lag_megatron.model.attention import SDPACoreAttention

    class Sdpa(SDPACoreAttention):
        use_matmul = False

    return stock(job, attention=Sdpa)


def hugging_face(job: StepJob) -> Step:
    """The model of transformers with torch's fused AdamW; bf16 by autocast, as its Trainer does."""
    import transformers

    config = job.config.model
    architecture = architecture_of(config)
    settings = transformers.AutoConfig.for_model(
        architecture.model_type,
        vocab_size=SHAPES[job.shape].vocabulary,
        tie_word_embeddings=config.tied_embeddings,
        **architecture.settings(config, config.num_layers),
    )
    model = getattr(transformers, architecture.name)(settings).to(job.device)
    model.load_state_dict(weights_for_transformers(job), strict=False)
    model.tie_weights()
    optimizer = torch.optim.AdamW(_groups(model), lr=job.lr, betas=BETAS, eps=EPS, fused=True)

    def step(batch: Batch, number: int) -> float:
        tokens, labels = batch["tokens"], batch["labels"]
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def minimal(job: StepJob) -> Step:
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
        lr=job.lr, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip
    compiled = torch.compile(model)

    def step(batch: Batch, number: int) -> float:
        loss = compiled(batch["tokens"], batch["labels"])
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


PEERS: Mapping[str, Callable[[StepJob], Step]] = {
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
