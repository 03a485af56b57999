"""Warnings of libraries that a user can do nothing about."""

import warnings


def ignore_library_warnings() -> None:
    """Hide what Megatron, torch and DeepSpeed warn of at import.

    Those warnings are of optional packages that are missing and of their own deprecations.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)(\.|$)")
