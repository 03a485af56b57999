"""Benches that need a GPU; tools/bench/gpu.sh runs all of them."""
