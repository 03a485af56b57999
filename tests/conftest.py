"""Ranks for tests: forked processes that form a world of their own.

``from conftest import run_ranks, pico_config, random_batches``.
"""

import contextlib
import faulthandler
import ipaddress
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from lag_megatron.run.compile_cache import set_cache_dirs

ROOT = Path(__file__).parents[1]
set_cache_dirs(ROOT / ".cache")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # before anything imports Triton, whose own parts look too
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts its background jobs with SIGINT ignored, and tests of Ctrl-C send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")

PICO_VOCABULARY = 64
_GRACE_S = 2.0


def run_ranks(fn: Any, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What ``fn(*args)`` returns on each of ``world_size`` forked ranks.

    The ranks find each other as under a launcher, so ``fn`` calls ``start_world`` itself.  An
    exception of a rank is raised here, with the rank and its traceback as a note; the other ranks
    are killed.

    Raises:
        TimeoutError: with the stacks of all ranks.
        ChildProcessError: if a rank died without an exception.
    """
    import lag_megatron.engine.engine  # noqa: F401  # once here, so that forked ranks start fast

    store, port = _rendezvous()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_work, args=(fn, args, rank, world_size, port, folder), daemon=True)
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        (folder / "go").touch()
        return _collect(ranks, folder, time.monotonic() + timeout)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
        for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        del store


def run_alone(fn: Any, *args: Any, timeout: float = 240) -> Any:
    """What ``fn(*args)`` returns in a fresh process of one rank: a fork could not use a GPU.

    Raises:
        ChildProcessError: if it did not return.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(send, fn, args), daemon=True)
    process.start()
    send.close()
    try:
        if not receive.poll(timeout):
            raise TimeoutError(f"{fn.__name__}: nothing after {timeout:g} s")
        return receive.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"{fn.__name__}: exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send_result(send: Any, fn: Any, args: tuple[Any, ...]) -> None:
    send.send(fn(*args))


def pico_config(*, num_layers=2, zero_stage=1, tensor=1, precision="fp32", llama=False, **model):
    """A model of a few thousand parameters on batches of 4 sequences of 8 tokens."""
    from lag_megatron.config import ModelConfig, ParallelConfig, RunConfig, StageConfig

    shape = {
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "seq_length": 8,
        "vocab_size": PICO_VOCABULARY,
    }
    if llama:
        shape |= {"num_query_groups": 2, "positions": "rope", "norm": "rmsnorm", "bias": False}
        shape |= {"activation": "swiglu", "tied_embeddings": False}
    return RunConfig(
        model=ModelConfig(num_layers=num_layers, **(shape | model)),
        stages=(StageConfig(steps=10),),
        parallel=ParallelConfig(
            zero_stage=zero_stage,
            tensor=tensor,
            precision=precision,
            micro_batch=1,
            global_batch=4,
        ),
    )


def sparing(values, *, slow):
    """Parameters of a test of which those that ``slow`` holds for run in ``make test-slow``."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[pytest.mark.slow] if slow(value) else [],
        )
        for value in values
    ]


def random_batches(config, world, step):
    """This rank's micro-batches of global batch ``step``, the same text whatever the world."""
    import torch

    parallel, length = config.parallel, config.model.seq_length
    text = torch.randint(
        0,
        PICO_VOCABULARY,
        (parallel.global_batch, length + 1),
        generator=torch.Generator().manual_seed(step),
    )
    rows = text.chunk(world.data_size)[world.data_rank]
    return [
        {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "position_ids": torch.arange(length).expand(len(part), length),
            "loss_mask": torch.ones(len(part), length),
        }
        for part in rows.split(parallel.micro_batch)
    ]


def train_and_save(config, folder, *, steps=3, tag="step3", client_state=None):
    """On each rank: an engine of ``config`` after ``steps`` steps, committed as ``folder/tag``."""
    from lag_megatron.checkpoint.storage import manifest
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=config.parallel.tensor)
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    for step in range(steps):
        engine.train_step(random_batches(config, world, step), step=step, lr=1e-2)
    draft = manifest.temporary(folder / tag)
    state = {"step": steps, "tokens": steps * 32, **(client_state or {})}
    engine.save(folder, draft.name, client_state=state)
    world.barrier()
    if world.is_coordinator:
        files = {path.name: manifest.file_entry(path) for path in draft.iterdir()}
        manifest.commit(folder / tag, files=files, metadata={"step": steps})
    stop_world()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A committed ZeRO-1 checkpoint of 2 layers on 2 ranks; never to be changed."""
    from dataclasses import asdict

    config = pico_config()
    folder = tmp_path_factory.mktemp("checkpoint")
    run_ranks(_train_and_save_with_model, 2, config, folder, asdict(config.model))
    return folder / "step3"


def _train_and_save_with_model(config, folder, model):
    train_and_save(config, folder, client_state={"model": model})


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Python's sockets reach this machine and no other."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise PermissionError(f"tests use no network, but connect to {host}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def _rendezvous():
    """A store of this process, on a port that the system chose, so that no other can take it."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, store.port


def _work(fn, args, rank, world_size, port, folder):
    import torch

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # every rank is a client of the store above
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    # A rank that came to the store before all are forked would set its thread to work, whose locks
    # the next fork would copy.
    while not (folder / "go").exists():
        time.sleep(0.001)
    stack = (folder / f"{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    try:
        outcome = (time.time(), fn(*args), None, "")
    except BaseException as error:
        outcome = (time.time(), None, error, traceback.format_exc())
    draft = folder / f"{rank}.part"
    try:
        draft.write_bytes(pickle.dumps(outcome))
        pickle.loads(draft.read_bytes())
    except Exception:
        error = RuntimeError(f"a result that cannot be pickled: {outcome[1:3]!r}")
        draft.write_bytes(pickle.dumps((outcome[0], None, error, outcome[3])))
    draft.rename(folder / f"{rank}.outcome")


def _collect(ranks, folder, deadline):
    outcomes: dict[int, Any] = {}
    while len(outcomes) < len(ranks):
        for rank, process in enumerate(ranks):
            ended = not process.is_alive()  # asked first: it may end right after the look below
            path = folder / f"{rank}.outcome"
            if rank not in outcomes and path.exists():
                outcomes[rank] = pickle.loads(path.read_bytes())
            elif rank not in outcomes and ended:
                code = process.exitcode
                outcomes[rank] = (
                    time.time(), None, ChildProcessError(f"rank {rank} ended with {code}"), "",
                )  # fmt: skip
        if any(outcome[2] for outcome in outcomes.values()):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    failed = [(o[0], rank, o[2], o[3]) for rank, o in outcomes.items() if o[2] is not None]
    if failed:
        _, rank, error, trace = min(failed, key=lambda entry: entry[:2])
        error.add_note(f"on rank {rank} of {len(ranks)}:\n{trace}")
        raise error
    if len(outcomes) < len(ranks):
        raise TimeoutError(_stacks(ranks, folder, set(range(len(ranks))) - set(outcomes)))
    for process in ranks:
        process.join(_GRACE_S)
    return [outcomes[rank][1] for rank in range(len(ranks))]


def _stacks(ranks, folder, unfinished):
    for rank in unfinished:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    texts = [f"rank {r}:\n{(folder / f'{r}.stack').read_text()}" for r in sorted(unfinished)]
    return f"ranks {sorted(unfinished)} did not end in time.\n" + "\n".join(texts)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty small documents of made-up words."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0).choices([f"w{i}" for i in range(90)], k=24_000)
    for number in range(40):
        text = " ".join(words[number * 600 : (number + 1) * 600])
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def tiny(tmp_path, tiny_tree):
    """A configuration file of a run of 20 steps, 2 to 3 layers, 4 candidates."""
    return tiny_tree(tmp_path)


@pytest.fixture(scope="session")
def tiny_tree(corpus):
    """Writes the tiny run's configuration into a folder."""
    tree = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 2,
            "num_query_groups": 2,
            "seq_length": 32,
            "dropout": 0.1,
        },
        "data": {
            "source": "text",
            "paths": [str(corpus)],
            "tokenizer": {"type": "bpe", "vocab_size": 300},
            "validation_fraction": 0.1,
            "validation_tokens": 1024,
        },
        "optimizer": {"lr": 3e-3, "schedule": {"warmup_steps": 4}},
        "parallel": {"zero_stage": 1, "micro_batch": 2, "global_batch": 8},
        "stages": [{"steps": 10}, {"steps": 10, "num_layers": 3}],
        "growth": {"rule": "lag", "lag": 3, "rungs": [1, 3]},
        "checkpoint": {"interval": 4},
        "tracking": {"validation_interval": 5, "log_interval": 1, "wandb": {"mode": "disabled"}},
    }

    def write(folder):
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
