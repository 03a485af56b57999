"""Tokenize text once, for any number of runs.

With --config: into the folder where a run of this configuration looks for it.  With --source and
--output: into a folder of its own, for `data: {source: prepared, paths: [DIR]}`.  An interrupted
call goes on when it is given again.  The result does not depend on the workers.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lag_megatron.cli.command import command
from lag_megatron.cli.parser import CONFIG_HELP, add_list_configs, command_parser, parse
from lag_megatron.cli.warning_filters import ignore_library_warnings
from lag_megatron.config import RunConfig, load_config, parse_config
from lag_megatron.config.installed import find_config
from lag_megatron.config.schema.ranges import MAX_WORKERS, require_positive, require_whole
from lag_megatron.errors import ConfigError

_CACHE = Path("runs") / ".cache" / "data"
_FLAGS = ("source", "paths", "text_key", "tokenizer", "tokenizer_type", "vocab_size", "sentinels",
          "objective", "validation_fraction", "seed", "seq_length")  # fmt: skip


@command(interrupted="The same command goes on from here.")
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and prepare; 2 for a user's error, 130 after Ctrl-C."""
    options = parse(_parser(), argv)
    ignore_library_warnings()
    config = _config(options)
    print(_prepare(config, options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "--config FILE | --source KIND --output DIR",
        "lag-prepare-data --config gpt2_small_lag --set data.paths=[text] --workers 8",
        "lag-prepare-data --source jsonl --paths text/*.jsonl.gz --vocab-size 32000 --output DIR",
    )
    add = parser.add_argument
    add("--config", help=f"{CONFIG_HELP}; its mixture gives a folder a source")
    add_list_configs(parser)
    add("--set", action="append", default=[], metavar="A.B=C", help="override, with --config")
    add("--source", choices=("stdlib", "text", "jsonl", "parquet", "datasets", "prepared"))
    add("--paths", nargs="+", metavar="PATH", help="files, folders, globs")
    add("--text-key", metavar="KEY", help="of JSON lines, or the column of a table (text)")
    add("--tokenizer", metavar="FILE|train", help="a tokenizer.json, or train one (train)")
    add("--tokenizer-type", choices=("bpe", "wordpiece"), help="of one that is trained (bpe)")
    add("--vocab-size", type=int, metavar="N", help="of one that is trained (4096)")
    add("--sentinels", type=int, metavar="N", help="tokens for ul2's spans (0)")
    add("--objective", choices=("causal", "mlm", "ul2"), help="mlm stores sentences (causal)")
    add("--validation-fraction", type=float, metavar="X", help="share of documents (0.01)")
    add("--seed", type=int, help="of the choice of documents to validate on (1234)")
    add("--seq-length", type=int, metavar="N", help="of the samples of --show (128)")
    add("--output", type=Path, metavar="DIR", help="where to; with --config by default the cache")
    add("--cache", type=Path, default=_CACHE, metavar="DIR", help=f"of all runs ({_CACHE})")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    add("--chunk-mb", type=float, default=32, metavar="X", help="what a worker does at a time (32)")
    add("--show", type=int, default=0, metavar="N", help="print that many samples of a batch")
    add("--verify", action="store_true", help="read all files again and compare checksums")
    return parser


def _config(options: argparse.Namespace) -> RunConfig:
    """The run's configuration, or a small one around what the options say."""
    given = [name for name in _FLAGS if getattr(options, name) is not None]
    require_whole(options.workers, "--workers", error=ConfigError, least=1, most=MAX_WORKERS)
    require_positive(options.chunk_mb, "--chunk-mb", error=ConfigError)
    require_whole(options.show, "--show", error=ConfigError)
    if options.config is not None:
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')}: the configuration says that already. Override "
                "it with --set, e.g. --set data.tokenizer.vocab_size=8192."
            )
        return load_config(find_config(options.config), overrides=options.set)
    if options.source is None or options.set:
        raise ConfigError("give --config FILE [--set A.B=C], or --source with its options.")
    if options.output is None and options.source != "prepared":
        raise ConfigError("--output: is needed with --source. Give the folder to make.")
    return parse_config(_tree(options), source="the options")


def _tree(options: argparse.Namespace) -> dict[str, Any]:
    def given(**names: str) -> dict[str, Any]:
        values = {key: getattr(options, name) for key, name in names.items()}
        return {key: value for key, value in values.items() if value is not None}

    masked = options.objective == "mlm"
    tokenizer = given(type="tokenizer_type", vocab_size="vocab_size", sentinels="sentinels")
    if options.tokenizer not in (None, "train"):
        tokenizer |= {"type": "file", "path": options.tokenizer}
    elif masked:
        tokenizer.setdefault("type", "wordpiece")
    data = given(
        source="source", paths="paths", text_key="text_key", objective="objective",
        validation_fraction="validation_fraction", seed="seed",
    )  # fmt: skip
    # Only the length matters here: no model is made.
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1}
    family = {"family": "bert", "norm_position": "post", "token_types": 2} if masked else {}
    samples = 128 if options.seq_length is None else options.seq_length
    length = {"num_query_groups": 1, "seq_length": samples}
    return {
        "model": {**shape, **family, **length},
        "data": {**data, "tokenizer": tokenizer},
        "parallel": {"micro_batch": 1, "global_batch": 1},
        "stages": [{"steps": 1}],
    }


def _prepare(config: RunConfig, options: argparse.Namespace) -> str:
    from lag_megatron.data import prepare_data  # imports torch: seconds
    from lag_megatron.data.preview import describe_samples

    if options.output and config.data.source == "prepared" and not config.data.mixture:
        raise ConfigError(f"--output {options.output}: the source is prepared already.")
    prepared = prepare_data(
        config.data,
        cache_dir=options.cache,
        output=options.output,
        workers=options.workers,
        chunk_bytes=max(1, int(options.chunk_mb * 2**20)),
    )
    lines = [_summary(source.name, source.data) for source in prepared.sources]
    if options.verify:
        prepared.verify()
        lines.append("all checksums are right")
    if options.show:
        lines.append(describe_samples(prepared, config, count=options.show))
    lines.append(f"{prepared.folder}: {prepared.vocab_size:,} tokens in the vocabulary")
    if options.output:
        settings = ["data.source=prepared", f"data.paths=[{options.output}]"]
        if config.data.mixture:
            settings.append("data.mixture=[]")
        given = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        lines.append(f"to train on it: {given}")
    return "\n".join(lines)


def _summary(name: str, data: Any) -> str:
    return (
        f"{name or data.source}: {data.train_tokens:,} tokens of {data.train_documents:,} "
        f"documents to train on, {data.validation_tokens:,} of {data.validation_documents:,} to "
        f"validate on ({data.bytes / 1e6:.1f} MB of text, {data.skipped_files} passed over)"
    )


if __name__ == "__main__":
    sys.exit(main())
