"""Train, grow and probe a run, on every rank: ``lag-train``, ``launch/train.py``."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from lag_megatron.cli.command import USER_ERROR, command
from lag_megatron.cli.parser import CONFIG_HELP, add_list_configs, command_parser, parse
from lag_megatron.cli.warning_filters import ignore_library_warnings
from lag_megatron.config import RunConfig, load_config
from lag_megatron.config.deepspeed import deepspeed_config, read_deepspeed_json
from lag_megatron.config.installed import cache_dir, find_config
from lag_megatron.distributed.hostfile import count_slots
from lag_megatron.errors import ConfigError, LagError
from lag_megatron.run.compile_cache import set_cache_dirs


def _print_error(error: LagError) -> int:
    """Print an error once, or from every rank that may be the only one to have it."""
    rank = _rank()
    if rank == 0 or (_in_a_world() and not error.on_all_ranks):
        where = "" if rank == 0 else f"[rank {rank}] "
        print(f"{where}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _in_a_world() -> bool:
    """Whether ranks have met; before that all of them find the same mistakes."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


@command(interrupted="The same command goes on from the last checkpoint.", on_error=_print_error)
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train, or print the plan; 2 for a user's error."""
    # Both have to be done before torch is imported, so nothing above may import it.
    ignore_library_warnings()
    set_cache_dirs(cache_dir())
    options = parse(_parser(), argv)
    options.config = find_config(options.config)
    config = load_config(options.config, overrides=options.set)
    if options.deepspeed_config:
        given = read_deepspeed_json(options.deepspeed_config)
        config = dataclasses.replace(config, deepspeed={**config.deepspeed, **given})
    if options.dry_run:
        return _dry_run(config, options)
    if options.hostfile is not None:
        raise ConfigError(
            f"--hostfile {options.hostfile}: it counts the ranks of a --dry-run. To train on "
            "its hosts, give it to the launcher: deepspeed --hostfile "
            f"{options.hostfile} --module lag_megatron.cli.train --config ..."
        )
    return _train(config, options)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "Train, grow and probe a run.  The same command goes on after any interruption.\n\n"
        "On several ranks: deepspeed [--hostfile H | --num_gpus N] --module lag_megatron.cli.train "
        "...,\nor torchrun -m lag_megatron.cli.train ...; alone it is one rank.",
        "--config CONFIG",
        "lag-train --config demo --dry-run",
        "deepspeed --num_gpus 2 --module lag_megatron.cli.train --config demo --set seed=7",
    )
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    add_list_configs(parser)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override")
    parser.add_argument("--run-dir", help="default: runs/<config name>")
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's tag")
    parser.add_argument(
        "--verify-data", action="store_true", help="compare all prepared data before training"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON; its autos are filled")
    parser.add_argument("--hostfile", help="for a dry run: count the ranks of this hostfile")
    # DeepSpeed's launcher gives it to every rank; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _dry_run(config: RunConfig, options: argparse.Namespace) -> int:
    from lag_megatron.training.dry_run import describe_run

    slots = count_slots(options.hostfile) if options.hostfile is not None else 0
    world_size = slots or config.parallel.world_size or 1
    deepspeed_config(config, world_size=world_size)
    if _rank() == 0:
        print(describe_run(config, world_size=world_size))
    return 0


def _train(config: RunConfig, options: argparse.Namespace) -> int:
    run_dir = options.run_dir or Path("runs") / Path(options.config).stem
    deepspeed_config(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    from lag_megatron.training.train import TrainRequest, train  # imports torch: seconds

    train(TrainRequest(config, Path(run_dir), options.resume, options.verify_data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
