"""What the trainers of step.py are given: a model, its weights and its batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lag_megatron.checkpoint import tensor_map
from lag_megatron.config import RunConfig, parse_config
from lag_megatron.engine import Engine
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
    config, world = _config(shape, "fp32"), start_world(tensor=1)
    layers, vocabulary = config.model.num_layers, SHAPES[shape].vocabulary
    engine = Engine(config, world, num_layers=layers, vocab_size=vocabulary)
    torch.save({n: p.detach().cpu() for n, p in engine._engine.module.named_parameters()}, file)
    stop_world()


def weights_for_transformers(job: Job) -> dict[str, Tensor]:
    """The weights by the names of transformers."""
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
