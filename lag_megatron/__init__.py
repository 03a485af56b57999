"""Landscape-aware growing of transformers on DeepSpeed and Megatron-Core.

Importing this package imports neither torch nor DeepSpeed: growth, conversion and reports run on
a laptop, and every program starts quickly.
"""

__version__ = "0.1.0"
