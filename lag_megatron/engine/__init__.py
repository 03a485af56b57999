"""The DeepSpeed engine and everything that touches DeepSpeed's insides."""
