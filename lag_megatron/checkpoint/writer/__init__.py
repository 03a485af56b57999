"""Writing checkpoints: jobs, files, checksums, progress after an interruption."""
