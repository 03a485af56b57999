"""A run from its command to its report: everything around the stage loop."""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

from lag_megatron import __version__
from lag_megatron.config import RunConfig, check_probe_groups, padded_vocab_size
from lag_megatron.config.installed import cache_dir
from lag_megatron.data import (
    BatchLoader,
    DataVerification,
    Prepared,
    open_prepared,
    prepare_data,
)
from lag_megatron.distributed.world import World, environment, start_world, stop_world
from lag_megatron.errors import ConfigError, RunError
from lag_megatron.growth.pool import growth_pools
from lag_megatron.planning.cost import parameter_count
from lag_megatron.report import write_report
from lag_megatron.run.directory import FACTS, RunDirectory, acquire, claim, read_facts, write_json
from lag_megatron.run.journal import Journal
from lag_megatron.run.metrics import Console, MetricsLog, read_rows
from lag_megatron.run.recorder import Recorder, RunLogs
from lag_megatron.run.resolved_config import as_journalled
from lag_megatron.run.rollback import roll_back
from lag_megatron.run.signals import StopFlag, Stopped
from lag_megatron.run.wandb_logger import Wandb
from lag_megatron.training.trainer import Trainer
from lag_megatron.training.training_context import TrainingContext


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """A run to train.

    Attributes:
        config: of the run.
        run_dir: its directory, on a file system that all hosts share.
        resume: ``auto`` goes on from the newest checkpoint, ``never`` refuses a directory that
            holds a run, a tag such as ``step00000800`` goes back to that checkpoint.
        verify_data: compare all prepared data with its checksums before training.
    """

    config: RunConfig
    run_dir: Path
    resume: str = "auto"
    verify_data: bool = False


def train(request: TrainRequest) -> None:
    """Train a run from its newest checkpoint to its end; every rank calls this.

    Raises:
        LagError: for a mistake of the user or of the machine, before anything is damaged.
    """
    config = request.config
    check_probe_groups(config, world_size=environment()[1])
    growth_pools(config)  # an impossible growth is refused before anything starts
    stop = StopFlag()
    world = start_world(tensor=config.parallel.tensor, timeout=config.parallel.timeout)
    run = RunDirectory(request.run_dir.resolve())
    with contextlib.ExitStack() as held:
        finished = world.run_on_rank0(lambda: _lock_run(run, request, held))
        if not finished:
            _require_shared(world, run)
            _train(world, run, request, stop)
        elif world.is_coordinator:
            Console().print(f"{run.root}: this run has finished.")
            Console().print(f"report: {write_report(run.root)}")
    world.barrier()  # the report and W&B may take longer than parallel.timeout
    stop_world()


def _lock_run(run: RunDirectory, request: TrainRequest, held: contextlib.ExitStack) -> bool:
    """Lock and prepare the run directory; whether its run has finished (coordinator only)."""
    if request.resume == "never" and run.journal.exists():
        raise RunError(
            f"{run.root}: holds a run already, and --resume never asks for a new one. Remove it or "
            "give another --run-dir."
        )
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run.root}: cannot create: {error.strerror}.") from None
    held.callback(acquire(run).close)
    claim(run, request.config)
    if request.resume not in ("auto", "never"):
        roll_back(run, request.resume)
    return Journal(run.journal).find("run_finished") is not None


def _require_shared(world: World, run: RunDirectory) -> None:
    def check() -> None:
        if not (run.root / "config.yaml").is_file():
            raise RunError(
                f"rank {world.rank} does not see {run.root}, which rank 0 has made. Put the run "
                "directory on a file system that all hosts share."
            )

    world.run_on_all_ranks(check)


def _train(world: World, run: RunDirectory, request: TrainRequest, stop: StopFlag) -> None:
    config = request.config
    console = Console()
    if world.is_coordinator:
        console.print(_introduction(run, config, world))
    data = world.run_on_rank0(lambda: prepare_data(config.data, cache_dir=run.data_cache))
    world.run_on_all_ranks(lambda: open_prepared(data.folder))
    check = _compare_data(world, data, everything=request.verify_data)
    vocab_size = world.run_on_rank0(lambda: _vocab_size(config, data))
    resolved = world.run_on_rank0(lambda: as_journalled(config, Journal(run.journal).events))
    # On a CPU a prefetching thread would slow the training down.
    loader = BatchLoader(data, config, world, prefetch=world.device.type == "cuda")
    context = TrainingContext(resolved, run, loader, stop, vocab_size, check.require_sound)
    world.run_on_rank0(lambda: _write_facts(world, run, config, data, vocab_size))
    logs = _logs(world, run, config, data, console) if world.is_coordinator else None
    recorder = Recorder(logs)
    _record_compared(world, recorder, check)
    for path in check.uncompared:
        recorder.print(
            f"{path}: not compared with its checksum, it was prepared without checksums of blocks; "
            "--verify-data reads all of it"
        )
    check.compare_later(stop.ask)
    try:
        Trainer(context, world, recorder).run()
        stopped = ""
    except Stopped as reason:
        stopped = str(reason)
    finally:
        check.close()
    _record_compared(world, recorder, check)
    if logs is not None:
        logs.wandb.finish(exit_code=1 if stopped else 0)
        last = (
            f"stopped ({stopped}). The same command goes on from here."
            if stopped
            else f"report: {write_report(run.root)}"
        )
        console.print(last)


def _compare_data(world: World, data: Prepared, *, everything: bool) -> DataVerification:
    """The comparison of the data with its checksums, of which the first part is done."""
    found: list[DataVerification] = []

    def compare() -> None:
        check = DataVerification(
            data,
            everything=everything,
            rank=world.rank,
            size=world.size,
            cache=cache_dir() / "verified_data",
        )
        found.append(check)
        check.compare_first()

    world.run_on_all_ranks(compare)
    return found[0]


def _record_compared(world: World, recorder: Recorder, check: DataVerification) -> None:
    """Journal how much of the data was compared so far."""
    compared = sum(world.run_on_all_ranks(lambda: check.compared))
    recorder.log_event("data_compared", once={"bytes": compared}, total=check.total)


def _introduction(run: RunDirectory, config: RunConfig, world: World) -> str:
    parallel = config.parallel
    return (
        f"lag_megatron {__version__}: {run.root}\n"
        f"{world.size} ranks on {world.device_name}, ZeRO-{parallel.zero_stage}, tensor parallel "
        f"{parallel.tensor}, {parallel.precision}; layers "
        + " -> ".join(str(config.layers_of(s)) for s in range(len(config.stages)))
    )


def _vocab_size(config: RunConfig, data: Prepared) -> int:
    wanted = config.model.vocab_size
    size = padded_vocab_size(data.vocab_size) if wanted == "auto" else wanted
    if size < data.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {size} is smaller than the tokenizer's {data.vocab_size}. "
            "Write auto, or a larger number."
        )
    if size % config.parallel.tensor:
        raise ConfigError(
            f"model.vocab_size: {size} does not divide by parallel.tensor {config.parallel.tensor}."
        )
    return size


def _write_facts(
    world: World, run: RunDirectory, config: RunConfig, data: Prepared, vocab_size: int
) -> None:
    """Write ``run.json``, and refuse to train on other text than the run started with."""
    path, digest = run.root / FACTS, data.digest
    before = read_facts(run.root).get("data_digest") if path.exists() else digest
    if before != digest:
        raise RunError(
            f"{path}: the text, or the tokenizer made from it, is not what this run began with "
            f"({before} then, {digest} now): samples and token numbers would change under the "
            "model. Restore the text, or give another --run-dir."
        )
    facts = {
        "data_digest": digest,
        "name": run.name,
        "version": __version__,
        "world_size": world.size,
        "device": world.device_name,
        "vocab_size": vocab_size,
        "parameters": [
            parameter_count(config.model, num_layers=config.layers_of(s), vocab_size=vocab_size)
            for s in range(len(config.stages))
        ],
        "unigram_entropy": data.unigram_entropy,
        "data_folder": str(data.folder.resolve()),
        "data": data.facts(),
    }
    write_json(path, facts)


def _logs(
    world: World, run: RunDirectory, config: RunConfig, data: Prepared, console: Console
) -> RunLogs:
    journal = Journal(run.journal)
    mixture = {source.name: source.weight for source in data.sources if source.name}
    journal.append(
        "run_started",
        world_size=world.size,
        resumed=bool(read_rows(run.metrics)),
        **({"sources": mixture} if mixture else {}),
    )
    wandb = Wandb(config.tracking, folder=run.root, config=asdict(config), console=console)
    return RunLogs(journal, MetricsLog(run.metrics), wandb, console)
