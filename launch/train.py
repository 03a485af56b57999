#!/usr/bin/env python3
"""Train, grow and probe a run.

deepspeed [--hostfile H | --num_gpus N] launch/train.py --config configs/demo.yaml

Also runs under torchrun and plain python (one rank).  The same command goes on after any
interruption.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Megatron and torch warn at import about optional packages and their own deprecations.
warnings.filterwarnings("ignore", module=r"(megatron|torch|deepspeed)(\.|$)")

from lag_megatron.run.compile_cache import keep_caches  # noqa: E402

keep_caches(ROOT)

from lag_megatron.config import load_config  # noqa: E402
from lag_megatron.config.deepspeed import deepspeed_config, read_deepspeed_json  # noqa: E402
from lag_megatron.errors import ConfigError, LagError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        overrides = list(options.set)
        config = load_config(options.config, overrides=overrides)
        if options.deepspeed_config:
            config = _with_deepspeed(config, options.deepspeed_config)
        if options.dry_run:
            return _dry_run(config, options)
        return _train(config, options)
    except LagError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or (_in_a_world() and not error.on_all_ranks):
            where = "" if rank == "0" else f"[rank {rank}] "
            print(f"{where}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2


def _in_a_world() -> bool:
    """Whether ranks have met; before that all of them find the same mistakes."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override")
    parser.add_argument("--run-dir", help="default: runs/<config name>")
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's tag")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON; its autos are filled")
    parser.add_argument("--hostfile", help="for a dry run: count the ranks of this hostfile")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _with_deepspeed(config, path):
    import dataclasses

    return dataclasses.replace(config, deepspeed={**config.deepspeed, **read_deepspeed_json(path)})


def _dry_run(config, options) -> int:
    from lag_megatron.training.dry_run import describe_run

    world_size = _hostfile_ranks(options.hostfile) or config.parallel.world_size or 1
    deepspeed_config(config, world_size=world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe_run(config, world_size=world_size))
    return 0


def _hostfile_ranks(path: str | None) -> int | None:
    if path is None:
        return None
    try:
        lines = [line.split("#")[0].split() for line in Path(path).read_text().splitlines()]
        slots = [field for words in lines for field in words[1:] if field.startswith("slots=")]
        return sum(int(field.removeprefix("slots=")) for field in slots)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a hostfile with lines like `host slots=8`: {error}"
        ) from None


def _train(config, options) -> int:
    run_dir = options.run_dir or Path("runs") / Path(options.config).stem
    deepspeed_config(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    from lag_megatron.training.train import TrainRequest, train  # imports torch: seconds

    train(TrainRequest(config, Path(run_dir), options.resume))
    return 0


if __name__ == "__main__":
    sys.exit(main())
