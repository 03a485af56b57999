"""Applying a growth plan to a checkpoint; a live engine fills its tensors the same way."""
