"""Kernels in CUDA C++: compiled, never run on a GPU; used where Triton is missing."""
