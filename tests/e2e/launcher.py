"""Starting, watching and killing real launches."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PATIENCE_S = 150


def command(config, run_dir, *options, ranks=2):
    """The launcher's command line, as a user would type it."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    # Below those that the system gives to connections of tests beside this one.
    port = str(random.SystemRandom().randrange(20_000, 32_000))
    launcher = [str(deepspeed), "--num_gpus", str(ranks), "--master_port", port]
    script = [str(ROOT / "launch" / "train.py"), "--config", str(config), "--run-dir", str(run_dir)]
    return [*launcher, *script, *options]


def start(config, run_dir, *options, ranks=2):
    """The launcher in the background, output in ``run_dir``'s neighbour ``.log``."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with Path(f"{run_dir}.log").open("ab") as log:
        return subprocess.Popen(
            command(config, run_dir, *options, ranks=ranks),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )


def start_in_group(launcher, config, run_dir, *options):
    """A run as a shell starts it: Ctrl-C reaches all processes of its group."""
    line = command(config, run_dir, *options)
    if launcher != "deepspeed":
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
        program = {"torchrun": [*torchrun, "--nproc-per-node", "2"], "python": [sys.executable]}
        script = next(n for n, word in enumerate(line) if word.endswith("train.py"))
        line = [*program[launcher], *line[script:]]
    with Path(f"{run_dir}.log").open("ab") as log:
        return subprocess.Popen(
            line, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )


def finish(process):
    """The exit code; everything is killed when it takes too long."""
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise


def run(config, run_dir, *options, ranks=2):
    """Launch and wait; returns the output."""
    process = start(config, run_dir, *options, ranks=ranks)
    code = finish(process)
    output = Path(f"{run_dir}.log").read_text()
    assert code == 0, output[-4000:]
    return output


def kill_all(process):
    """SIGKILL for the launcher and everything below it, as a dying host would."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait(20)


def wait_for(path, text, process, *, count=1):
    """Wait until a file holds ``text`` ``count`` times."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count(text) >= count:
            return
        assert process.poll() is None, f"ended before {text!r} stood in {path}"
        time.sleep(0.02)
    kill_all(process)
    raise TimeoutError(f"{text!r} did not come into {path}")


def ranks_of(process):
    """The training processes below a launcher."""
    script = str(ROOT / "launch" / "train.py")
    family = psutil.Process(process.pid).children(recursive=True)
    return [p for p in family if "--local_rank=" in " ".join(p.cmdline()) and script in p.cmdline()]
