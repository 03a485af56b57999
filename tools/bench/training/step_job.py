"""What the trainers of step.py are given: a model, its weights and its batches."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint.families.roles import megatron_role
from lag_megatron.checkpoint.hf import tensor_map
from lag_megatron.checkpoint.hf.architecture import architecture_of
from lag_megatron.config import RunConfig, parse_config
from lag_megatron.distributed.world import start_world, stop_world
from lag_megatron.engine.engine import Engine
from lag_megatron.growth.weight_init import Normal, initial_weights
from lag_megatron.model import build_model
from lag_megatron.planning.cost import training_flops_per_token

LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True, slots=True)
class StepShape:
    """A model, the number of sequences of a step, and which other trainers can train it.

    The model has to train at ``lr``: where it does not, small differences of losses grow.
    """

    model: Mapping[str, Any]
    vocabulary: int
    batch: int
    peers: tuple[str, ...]
    lr: float = LR


_GPT2 = {"family": "gpt", "positions": "learned", "norm": "layernorm", "activation": "gelu"}
_LLAMA = {"family": "gpt", "positions": "rope", "norm": "rmsnorm", "activation": "swiglu",
          "bias": False, "tied_embeddings": False}  # fmt: skip
# As Megatron-Core has it: pre-norm, and exact GELU in its head.
_BERT = {"family": "bert", "activation": "gelu_exact", "token_types": 2}
_SMALL = {"num_layers": 12, "hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 4,
          "num_query_groups": 4, "seq_length": 128}  # fmt: skip
SHAPES = {
    "small": StepShape(
        _GPT2 | _SMALL,
        vocabulary=8192,
        batch=8,
        peers=("stock", "stock_sdpa", "hugging_face", "minimal"),
    ),
    "small_bert": StepShape(_BERT | _SMALL, vocabulary=8192, batch=8, peers=("stock",)),
    "bert16": StepShape(
        _BERT | {"num_layers": 16, "hidden_size": 768, "ffn_hidden_size": 3072,
                 "num_attention_heads": 12, "num_query_groups": 12, "seq_length": 512},
        vocabulary=30592,
        batch=64,
        peers=("stock",),
        lr=1e-4,
    ),
    "decoder1b": StepShape(
        _LLAMA | {"num_layers": 12, "hidden_size": 2048, "ffn_hidden_size": 5120,
                  "num_attention_heads": 16, "num_query_groups": 16, "seq_length": 1280},
        vocabulary=256_000,
        batch=8,
        peers=("stock", "stock_sdpa", "hugging_face"),
        lr=1e-4,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepJob:
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

    @property
    def lr(self) -> float:
        """The learning rate of every step."""
        return SHAPES[self.shape].lr

    @property
    def flops(self) -> float:
        """Floating-point operations that the model takes for one step."""
        config, shape = self.config, SHAPES[self.shape]
        per_token = training_flops_per_token(
            config, num_layers=config.model.num_layers, vocab_size=shape.vocabulary
        )
        return float(per_token * shape.batch * config.model.seq_length)

    def batch(self, step: int) -> dict[str, Tensor]:
        """A step's batch as this project's data give it; BERT predicts 15 % of the positions."""
        shape = SHAPES[self.shape]
        rows, length = shape.batch, shape.model["seq_length"]
        draw = torch.Generator().manual_seed(step)
        text = torch.randint(shape.vocabulary, (rows, length + 1), generator=draw)
        batch = {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "position_ids": torch.arange(length).repeat(rows, 1),
            "loss_mask": torch.ones(rows, length),
        }
        if shape.model["family"] == "bert":
            count = round(0.15 * length)
            places = torch.stack([torch.randperm(length, generator=draw) for _ in range(rows)])
            places = places[:, :count].sort().values
            batch |= {
                "token_types": torch.zeros_like(batch["tokens"]),
                "padding_mask": torch.ones(rows, length, dtype=torch.bool),
                "masked_positions": places,
                "labels": batch["labels"].gather(1, places),
                "loss_mask": torch.ones(rows, count),
            }
        return batch


def _config(shape: str, dtype: str) -> RunConfig:
    given = SHAPES[shape]
    return parse_config(
        {
            "model": dict(given.model),
            "data": {
                "source": "stdlib",
                "objective": "mlm" if given.model["family"] == "bert" else "causal",
                "tokenizer": {"type": "wordpiece"},
            },
            "optimizer": {
                "lr": given.lr, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY,
                "grad_clip": CLIP,
            },
            "parallel": {
                "zero_stage": 1, "micro_batch": given.batch, "global_batch": given.batch,
                "precision": dtype,
            },
            "stages": [{"steps": 1}],
        }
    )  # fmt: skip


@torch.no_grad()
def write_weights(shape: str, file: Path, device: str) -> None:
    """Draw the initial weights of all trainers, by Megatron-Core's names and distributions."""
    config, vocabulary = _config(shape, "fp32"), SHAPES[shape].vocabulary
    start_world(tensor=1)
    layers, std = config.model.num_layers, config.model.init_std
    model = build_model(config.model, config.parallel, num_layers=layers, vocab_size=vocabulary)
    draw, weights = torch.Generator(device).manual_seed(0), {}
    for name, parameter in model.named_parameters():
        fresh = initial_weights(
            megatron_role(name), name, parameter.shape, num_layers=layers, init_std=std, key=""
        )
        made = torch.empty(parameter.shape, device=device)
        if isinstance(fresh, Normal):
            made.normal_(std=fresh.std, generator=draw)
        else:
            made.fill_(fresh.value)
        weights[name] = made.cpu()
    torch.save(weights, file)
    stop_world()


@torch.no_grad()
def take_weights(engine: Engine, file: Path) -> None:
    """Have this project's engine, under ZeRO-1 on one rank, start from them."""
    weights, state = torch.load(file, mmap=True), engine.state
    for name, parameter in engine.module.named_parameters():
        (masters,) = itertools.chain(*state.slices(name.__eq__).values())
        masters.copy_(weights[name].to(parameter.dtype).view(-1))
    state.sync_weights()


def weights_for_transformers(job: StepJob) -> dict[str, Tensor]:
    """The weights under the names of transformers."""
    model, weights = job.config.model, torch.load(job.weights, mmap=True)
    size = model.hidden_size // model.num_attention_heads
    heads = tensor_map.Heads(model.num_query_groups, size)
    rows = tensor_map.expand(
        architecture_of(model).mappings,
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
