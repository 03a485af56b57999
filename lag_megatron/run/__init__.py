"""A run directory and what is written there: journal, metrics, W&B; signals and rollback."""
