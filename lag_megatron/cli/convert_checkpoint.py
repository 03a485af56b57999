"""Take a checkpoint from one format to another, growing it on the way if asked.

SOURCE may be of DeepSpeed (ZeRO 0 to 3, or universal), of Megatron-Core (torch_dist), of torch
(Distributed Checkpoint) or of transformers (BERT, GPT-2, Llama).
"""

import argparse
import sys
from pathlib import Path

from lag_megatron.checkpoint.families.layer_stack import count_layers
from lag_megatron.checkpoint.families.roles import foreign_name
from lag_megatron.checkpoint.hf.tokenizer import TokenizerFile
from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.checkpoint.state.source import CheckpointSource, UnshardedCheckpoint
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.writer.progress_bar import progress_bar
from lag_megatron.cli.command import command
from lag_megatron.cli.growth_options import add_growth_options, check_numbers, plan_of, topology_of
from lag_megatron.cli.parser import command_parser, parse
from lag_megatron.errors import PlanError, printable
from lag_megatron.growth.apply.conversion import Conversion
from lag_megatron.growth.apply.verify import differences

# How to load each format; that a program has loaded it is not claimed.
_LOAD = {
    "zero": 'load_checkpoint("{0}") of DeepSpeed',
    "universal": 'load_checkpoint("{0}") of DeepSpeed, under '
    '{{"checkpoint": {{"load_universal": true}}}}',
    "megatron": "--load {0} --ckpt-format torch_dist of Megatron",
    "hf": 'from_pretrained("{0}") of transformers',
}


@command(interrupted="The same command goes on from here.")
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and convert; 2 for a user's error, 1 where --verify finds one."""
    options = parse(_parser(), argv)
    check_numbers(options)
    source = open_checkpoint(
        options.source, vocab_size=options.vocab_size, weights_only=options.weights_only
    )
    if options.non_homogeneous_layers and options.to != "megatron":
        raise PlanError(f"--non-homogeneous-layers: for --to megatron, not {options.to}.")
    conversion = _conversion(options, source)
    target = conversion.target_dir(options.target)
    job = conversion.job(target)
    print(printable(f"{source.path} -> {target}"))
    for note in source.notes if isinstance(source, UnshardedCheckpoint) else ():
        print(printable(note))
    for line in conversion.trainer_files(target).describe():
        print(printable(line))
    print(f"to write: {job.needed / 2**20:.1f} MiB")
    if options.dry_run:
        return 0
    with progress_bar(job.needed) as written:
        is_new = write(job, workers=options.workers, written=written, lock=options.lock)
    done = "written" if is_new else "there already"
    print(printable(f"{done}: {target}, {_holds(conversion)}"))
    print(printable(f"to load it: {_LOAD[options.to].format(options.target)}"))
    return _verify(conversion, target) if options.verify else 0


def _holds(conversion: Conversion) -> str:
    """What was written: of which model, under whose names."""
    state = conversion.unsharded
    layers = f"{count_layers(state.shapes)} layers"
    if conversion.to == "hf":
        return f"a {conversion.export.architecture.name} of {layers}, without optimizer states"
    if foreign_name(state.shapes) is not None:
        return f"of {layers}, with the source's parameter names"
    if any(".post_mlp_layernorm." in name for name in state.shapes):
        return (
            f"of {layers}, with the parameter names of lag_megatron's post-LN BERT, which "
            "Megatron-Core's own BERT does not have"
        )
    return f"of {layers}, with Megatron-Core's parameter names"


def _verify(conversion: Conversion, target: Path) -> int:
    found = list(differences(conversion, target))
    for line in found:
        print(printable(line))
    if not found:
        what = "weight" if conversion.to == "hf" else "master and every moment"
        print(f"verified: every {what} of the target has the source's value")
    return 1 if found else 0


def _conversion(options: argparse.Namespace, source: CheckpointSource) -> Conversion:
    zero_stage = 1 if isinstance(source, UnshardedCheckpoint) else None  # there is no stage to keep
    return Conversion(
        source=source,
        plan=plan_of(options, source, may_stay=True),
        to=options.to,
        topology=topology_of(options, source.topology, zero_stage=zero_stage),
        tokenizer=_tokenizer(options.tokenizer),
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        vocabulary=options.vocab_size,
        allow_nonfinite=options.allow_nonfinite,
        stacked=not options.non_homogeneous_layers,
    )


def _tokenizer(file: Path | None) -> TokenizerFile | None:
    if file is None:
        return None
    from lag_megatron.data.datasets.tokenizer import load_tokenizer  # brings Megatron: seconds

    return TokenizerFile(file, end_id=load_tokenizer(file).eod)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "--to FORMAT SOURCE TARGET",
        "lag-convert grown model --to hf --tokenizer tokenizer.json",
        "lag-convert model ckpt --to zero --world-size 8 --zero-stage 1",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="its directory, or one that points to it")
    add("target", type=Path, metavar="TARGET", help="gets a tag; with --to hf it is the directory")
    add("--to", required=True, choices=sorted(_LOAD), help="the format to write")
    add_growth_options(parser)
    add("--vocab-size", type=int, metavar="N", help="rows of the vocabulary: from transformers "
        "with padding (default: rounded up to 128), to transformers without")  # fmt: skip
    add("--weights-only", action="store_true", help="leave out a torch_dist's optimizer states")
    add("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json to write with --to hf")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights of hf")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of hf")
    add("--non-homogeneous-layers", action="store_true", help="number the layers of megatron "
        "rather than stacking them")  # fmt: skip
    add("--verify", action="store_true", help="compare the target with the source afterwards")
    return parser


if __name__ == "__main__":
    sys.exit(main())
