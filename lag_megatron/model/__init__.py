"""Megatron-Core models from our configuration, and their losses."""

import torch

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.bert import build_bert
from lag_megatron.model.bf16_emulation import emulate_bf16_matmuls, needs_bf16_emulation
from lag_megatron.model.cpu_shims import install_cpu_shims
from lag_megatron.model.gpt import build_gpt
from lag_megatron.model.losses import labels_of, loss_sums, mean_loss
from lag_megatron.model.sequence_parallel import sum_partial_gradients

__all__ = ["build_model", "labels_of", "loss_sums", "mean_loss"]


def build_model(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int, vocab_size: int
) -> torch.nn.Module:
    """This tensor-parallel rank's part of a model, on the CPU, its weights not yet drawn."""
    install_cpu_shims()
    build = build_bert if model.family == "bert" else build_gpt
    built = build(model, parallel, num_layers=num_layers, vocab_size=vocab_size)
    dtype = torch.bfloat16 if parallel.precision == "bf16" else torch.float32
    stays_here = not torch.cuda.is_available()
    if stays_here and needs_bf16_emulation(dtype, torch.device("cpu")):
        emulate_bf16_matmuls(built)
    if parallel.sequence_parallel:
        sum_partial_gradients(built)
    return built
