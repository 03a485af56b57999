"""Writing checkpoints: jobs, files, checksums, resuming after an interruption."""
