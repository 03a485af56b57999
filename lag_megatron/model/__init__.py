"""Megatron-Core models and their losses."""

from lag_megatron.model.gpt import build_gpt, token_losses

__all__ = ["build_gpt", "token_losses"]
