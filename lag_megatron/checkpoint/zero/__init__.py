"""DeepSpeed's ZeRO checkpoints: reading, writing, loading."""
