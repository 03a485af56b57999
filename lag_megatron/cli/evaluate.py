"""Downstream scores of a model, by lm-evaluation-harness on local files; no network is used.

MODEL is a run directory (its newest checkpoint), a checkpoint, or a directory of transformers.
Checkpoints are written as one first, to a temporary directory or to --export-dir.

Tasks and their files, each of which may be compressed (.gz):

  lambada   accuracy of a passage's last word, 1-shot
            lambada*.jsonl   {"context": "...", "continuation": "word"}
  triviaqa  exact match with any alias, 1-shot
            triviaqa*.jsonl  {"context": "Question: ...\\nAnswer:", "answer": "...", "aliases": []}
  tydiqa    exact match on English gold passages, 1-shot
            tydiqa*.json[l]  SQuAD's JSON or lines of {"id": "english-...", "context", "question",
                             "answers"}; or the primary task's lines, from which gold passages are
                             derived
  wikitext  perplexity of articles, by word and by byte
            wikitext*.txt    articles begin with lines like " = Title = "

Answers are compared after SQuAD's normalisation.  Prompts that are longer than the model's window
lose their beginning.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lag_megatron.atomic_io import write_file
from lag_megatron.cli.command import command
from lag_megatron.cli.lock_option import add_lock_option
from lag_megatron.cli.parser import command_parser, parse
from lag_megatron.cli.warning_filters import ignore_library_warnings
from lag_megatron.errors import ConfigError
from lag_megatron.evaluation.candidates import score_candidates
from lag_megatron.evaluation.export import ExportOptions, export_to_transformers, find_checkpoint
from lag_megatron.evaluation.harness import evaluate, format_results, require_harness
from lag_megatron.evaluation.task_data import TASKS, find_file, read_documents
from lag_megatron.small_files import read_json
from lag_megatron.targets.file_lock import sole_writer
from lag_megatron.targets.writable import require_writable


@command()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and do what it says; 2 for a user's error."""
    options = parse(_parser(), argv)
    ignore_library_warnings()
    _run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "--data DIR|TASK=FILE MODEL",
        "lag-evaluate runs/demo --tasks lambada,wikitext --data sets/",
        "lag-evaluate model --tasks triviaqa --data triviaqa=tqa.jsonl.gz --output scores.json",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run, checkpoint or directory of transformers")
    add("--tasks", default=",".join(TASKS), metavar="A,B", help=f"of {','.join(TASKS)} (all)")
    add(
        "--data",
        action="append",
        required=True,
        metavar="DIR|TASK=FILE",
        help="folder with the files, or one task's file; repeats",
    )
    add("--limit", type=_positive, metavar="N", help="only the first N items of each task")
    add("--batch-size", type=_positive, default=16, metavar="N", help="sequences at a time (16)")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add("--export-dir", type=Path, metavar="DIR", help="keep the directory of transformers here")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of exported weights")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, if not the model's own")
    add_lock_option(parser)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    add(
        "--candidates",
        action="store_true",
        help="of a run: score the kept state of every candidate, for its report",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {value})")
    return value


def _targets(options: argparse.Namespace) -> Iterator[Path]:
    """What is written beside an exported model, which has a lock of its own."""
    if options.output:
        yield options.output
    if options.candidates and options.model.is_dir():
        yield options.model / "scores"


def _run(options: argparse.Namespace) -> None:
    require_harness()
    if options.candidates and options.limit:
        raise ConfigError(
            "--limit: the report would show scores of a part as if they were whole. Leave it out, "
            "or --candidates."
        )
    data = _files(options)
    if options.output:
        _require_results(options.output)
    for task, path in data.items():
        read_documents(task, path)
    settings = {
        "limit": options.limit,
        "batch_size": options.batch_size,
        "device": _device(options),
    }
    with ExitStack() as locks:
        for target in _targets(options):
            locks.enter_context(sole_writer(target, lock=options.lock))
        _score(options, partial(_evaluate, options, data, settings))


def _require_results(file: Path) -> None:
    """Refuse to write over a file with anything but earlier results: it may be an input.

    Raises:
        ConfigError: if it holds something else, or cannot be written.
    """
    require_writable(file, "--output", error=ConfigError)
    if not file.exists():
        return
    try:
        found = read_json(file, what="earlier results", error=ConfigError)
    except ConfigError:
        found = {}
    if not {"model", "results"} <= found.keys():
        raise ConfigError(
            f"--output {file}: is there already and holds no results of this program, so it is "
            "left alone. Name another file."
        )


def _score(options: argparse.Namespace, results: Callable[[Path], dict[str, Any]]) -> None:
    """Evaluate, print and write."""
    written: dict[str, Any] = {}
    about = {"model": str(options.model), "dtype": options.dtype, "limit": options.limit}
    if options.candidates:
        for candidate, found in score_candidates(options.model, results):
            print(f"{candidate}\n{format_results(found)}", flush=True)
            written[candidate] = found
    else:
        path = find_checkpoint(options.model)
        about["evaluated"] = str(path)
        written = results(path)
        print(format_results(written))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**about, "results": written}, indent=1)
        write_file(options.output, text)


def _evaluate(
    options: argparse.Namespace, data: dict[str, Path], settings: dict[str, Any], path: Path
) -> dict[str, Any]:
    folder: Path | None = options.export_dir
    if folder and options.candidates:  # growthNN/<id>, as in the run directory
        folder = folder.joinpath(*path.parts[-3:-1])
    export = ExportOptions(
        tokenizer=options.tokenizer, dtype=options.dtype, folder=folder, lock=options.lock
    )
    with export_to_transformers(path, export) as model:
        return evaluate(model, data, **settings)


def _files(options: argparse.Namespace) -> dict[str, Path]:
    """The file of each task."""
    tasks = options.tasks.split(",")
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise ConfigError(f"--tasks: {unknown[0]!r} is no task. Known: {', '.join(TASKS)}.")
    named: dict[str, Path] = {}
    folders: list[Path] = []
    for text in options.data:
        task, equals, file = text.partition("=")
        if equals and task in TASKS:
            named[task] = Path(file)
        elif Path(text).is_dir():
            folders.append(Path(text))
        else:
            raise ConfigError(
                f"--data {text}: neither a folder nor TASK=FILE, of {', '.join(TASKS)}."
            )
    if missing := [task for task in tasks if task not in named and not folders]:
        raise ConfigError(f"--data: no file for the task {missing[0]}: add {missing[0]}=FILE.")
    return {task: named.get(task) or find_file(task, folders) for task in tasks}


def _device(options: argparse.Namespace) -> str:
    if options.device:
        return str(options.device)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
