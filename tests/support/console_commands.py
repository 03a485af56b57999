"""The console commands of ``setup.py``: ``from console_commands import entry_points``."""

import functools
import re
import runpy
from unittest import mock

from conftest import ROOT


@functools.cache
def entry_points():
    """``module:function`` of each console command, by its name."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    lines = setup.call_args.kwargs["entry_points"]["console_scripts"]
    return dict(re.split(r"\s*=\s*", line) for line in lines)
