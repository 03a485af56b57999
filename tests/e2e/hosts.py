"""Two hosts on this machine: network namespaces with their own addresses, names, processes."""

import contextlib
import functools
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from launcher import ROOT, finish

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "eth0"
NAMED = Path("/etc/netns")  # `ip netns exec` binds a namespace's files from here over those in /etc
PREFIX = "lag-megatron-"


@dataclass
class Host:
    """One machine as a cluster has many of them; its processes see only each other."""

    number: int
    namespace: str
    launchers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def name(self):
        return NAMES[self.number]

    def start(self, command, log):
        """A command on this host, in the background; its output is appended to ``log``."""
        dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
        inside = ["ip", "netns", "exec", self.namespace]
        own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["sh", "-c", f'hostname {self.name}; "$@" & wait $!', "sh"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*dies_with_us, *inside, *own, *script, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
        self.launchers.append(process)
        return process

    def kill(self):
        """The power goes: every process of this host ends at once."""
        for launcher in self.launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                for init in psutil.Process(launcher.pid).children():
                    init.kill()  # with it goes its whole namespace
            launcher.wait(20)
        self.launchers.clear()

    def link(self, state):
        """Plug the cable in or out: ``up`` or ``down``."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, state)

    def ranks(self):
        """The training processes that run here."""
        script = str(ROOT / "launch" / "train.py")
        below = [p for launcher in self.launchers for p in _below(launcher.pid)]
        return [p for p in below if script in p.cmdline() and "--local_rank=0" in p.cmdline()]


def launch(hosts, config, run_dir, *options):
    """Start a run, one rank a host, as a user without ssh would; the launchers by host."""
    hostfile = run_dir.with_suffix(".hostfile")
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    port = str(random.SystemRandom().randrange(20_000, 32_000))
    launchers = []
    for host in hosts:
        command = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hostfile)]
        command += ["--no_ssh", "--node_rank", str(host.number)]
        command += ["--master_addr", ADDRESSES[0], "--master_port", port]
        command += [str(ROOT / "launch" / "train.py"), "--config", str(config)]
        command += ["--run-dir", str(run_dir), *options]
        launchers.append(
            host.start(["env", f"GLOO_SOCKET_IFNAME={INTERFACE}", *command], log_of(host, run_dir))
        )
    return launchers


def run_on(hosts, config, run_dir, *options):
    """Launch on both hosts and wait."""
    for host, launcher in zip(hosts, launch(hosts, config, run_dir, *options), strict=True):
        code = finish(launcher)
        assert code == 0, log_of(host, run_dir).read_text()[-4000:]


def log_of(host, run_dir):
    """Where the output of a host's launchers goes."""
    return Path(f"{run_dir}.{host.name}.log")


@contextlib.contextmanager
def two_hosts():
    """Two hosts with a cable between them; whatever happens, nothing of them is left."""
    _sweep()
    run = f"{PREFIX}{os.getpid()}-{random.SystemRandom().randrange(1000)}"
    hosts = [Host(number, f"{run}{'ab'[number]}") for number in range(2)]
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            folder = NAMED / host.namespace
            folder.mkdir(parents=True)
            named = zip(("127.0.0.1", *ADDRESSES), ("localhost", *NAMES), strict=True)
            (folder / "hosts").write_text("".join(f"{a} {name}\n" for a, name in named))
        ends = [["netns", host.namespace, "type", "veth"] for host in hosts]
        _ip("link", "add", INTERFACE, *ends[0], "peer", "name", INTERFACE, *ends[1][:2])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            _ip("-n", host.namespace, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            _remove(host.namespace)


def _sweep():
    """Remove what tests left that were killed themselves; their processes died with them."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        if not psutil.pid_exists(int(path.name.removeprefix(PREFIX).partition("-")[0])):
            _remove(path.name)


def _remove(namespace):
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
    shutil.rmtree(NAMED / namespace, ignore_errors=True)


@functools.cache
def why_not():
    """Why this machine cannot play two hosts; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [
        name for name in ("ip", "unshare", "setpriv", "hostname") if shutil.which(name) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt install iproute2)"
    try:
        with two_hosts() as (host, _):
            process = host.start(["true"], Path(os.devnull))
            return "" if process.wait(20) == 0 else "unshare cannot make namespaces here"
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _below(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
