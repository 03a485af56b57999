"""The commands behind the programs in ``tools/``, called as functions with their arguments."""

import importlib


def program(name):
    module = importlib.import_module(f"lag_megatron.cli.{name}")
    return lambda *arguments: module.main([str(a) for a in arguments])


grow = program("grow_checkpoint")
inspect = program("inspect_checkpoint")
