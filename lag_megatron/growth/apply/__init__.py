"""Applying a growth plan: to files, and to a live engine."""
