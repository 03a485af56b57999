"""Benches of training steps and their parts, on a CPU."""
