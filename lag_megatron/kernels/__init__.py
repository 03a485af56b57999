"""Fused operations: AdamW, writing a grown state, softmax with cross-entropy, activations.

``adamw``, ``grow`` and ``softmax`` choose an implementation by device; activations and attention
have one for the CPU alone.

- ``cpu``: C++ in ctypes libraries, compiled on first use.
- ``triton``: what CUDA devices use.
- ``cuda``: a substitute in CUDA C++ where Triton is not installed; not needed otherwise.
- ``common``: compiling and loading, and the arguments that the implementations share.
"""
