"""The training loop over stages, and the dry run."""
