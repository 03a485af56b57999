"""Optional: AdamW and writing a grown state in CUDA C++, for machines without Triton.

Tests compile these kernels for sm_80 and sm_90, but they have never run on a GPU.  Nothing depends
on them where Triton is installed, and the package can be deleted with the two branches that import
it, in ``kernels/adamw.py`` and ``kernels/grow.py``.
"""
