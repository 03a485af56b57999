"""Commands: each module parses the arguments of one and calls the library."""

from lag_megatron.cli.command import exit_on_interrupt

exit_on_interrupt()  # here, because the modules of commands import torch, which takes seconds
