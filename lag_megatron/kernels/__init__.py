"""Kernels of our own: on a CPU in torch, on CUDA in Triton."""
