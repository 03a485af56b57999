"""Benches: one program for each claim of speed in docs/benchmarks.md."""
