"""Megatron-Core's distributed checkpoints and its legacy per-rank files."""
