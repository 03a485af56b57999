"""Megatron-Core models from our configuration, and their losses."""

import torch

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.gpt import build_gpt
from lag_megatron.model.losses import labels_of, loss_sums, mean_loss

__all__ = ["build_model", "labels_of", "loss_sums", "mean_loss"]


def build_model(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int, vocab_size: int
) -> torch.nn.Module:
    """This tensor-parallel rank's part of a model, on the CPU, its weights not yet drawn."""
    return build_gpt(model, parallel, num_layers=num_layers, vocab_size=vocab_size)
