"""The programs in ``tools/``, called as functions with their arguments."""

import importlib.util

from conftest import ROOT


def program(name):
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(a) for a in arguments])


grow = program("grow_checkpoint")
inspect = program("inspect_checkpoint")
