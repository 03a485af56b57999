"""Folders of compilers' builds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lag_megatron.run.compile_cache import set_cache_dirs

ROOT = Path(__file__).parents[3]
NAMES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def test_all_lie_beside_each_other(tmp_path):
    found: dict[str, str] = {}
    set_cache_dirs(tmp_path, found)
    parts = ("torch_extensions", "triton", "inductor")
    assert found == {name: str(tmp_path / part) for name, part in zip(NAMES, parts, strict=True)}


def test_what_is_named_already_stays(tmp_path):
    given = {"TORCH_EXTENSIONS_DIR": "/shared/ops", "TRITON_CACHE_DIR": "/fast/triton"}
    found = dict(given)
    set_cache_dirs(tmp_path, found)
    assert found == {**given, "TORCHINDUCTOR_CACHE_DIR": "/shared/inductor"}


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--nproc_per_node=1")])
def test_a_launch_keeps_them(launcher, tmp_path):
    """Whatever starts ``launch/train.py``, it names them before torch is imported."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import contextlib, json, os, runpy, sys\n"
        "sys.argv = ['train.py', '--config', 'none.yaml']\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    runpy.run_path({str(ROOT / 'launch' / 'train.py')!r}, run_name='__main__')\n"
        "early = 'torch' in sys.modules\n"
        f"found = {{name: os.environ[name] for name in {NAMES!r}}}\n"
        f"json.dump([early, found], open({str(tmp_path / 'found.json')!r}, 'w'))\n"
    )
    plain = {k: v for k, v in os.environ.items() if k not in NAMES}
    plain["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "ops")
    subprocess.run([sys.executable, *launcher, str(probe)], check=True, env=plain, cwd=ROOT)
    early, found = json.loads((tmp_path / "found.json").read_text())
    assert not early
    assert list(found.values()) == [str(tmp_path / n) for n in ("ops", "triton", "inductor")]


def test_a_mark_of_a_killed_build_is_removed(tmp_path):
    import os

    from lag_megatron.run.compile_cache import remove_stale_locks

    mark = tmp_path / "op" / "lock"
    mark.parent.mkdir()
    mark.touch()
    os.utime(mark, (1, 1))
    remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert not mark.exists()


def test_a_live_build_is_waited_for(tmp_path):
    import threading
    import time

    from lag_megatron.run.compile_cache import remove_stale_locks

    mark = tmp_path / "op" / "lock"
    mark.parent.mkdir()
    mark.touch()
    threading.Timer(1.0, mark.unlink).start()
    started = time.monotonic()
    remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert not mark.exists()
    assert 0.5 < time.monotonic() - started < 30
