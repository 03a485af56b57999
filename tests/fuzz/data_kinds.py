"""Evaluation sets and tokenizers."""

from functools import partial
from pathlib import Path

import tokenizers
from evaluating import LAMBADA, TRIVIA, tydi_rows, write_lines
from kind import Kind

from lag_megatron.data.datasets.tokenizer import load_tokenizer
from lag_megatron.evaluation.task_data import read_documents

_USERS = "text is the user's to choose"


def _build(folder: Path) -> None:
    rows = [{"context": context, "continuation": word} for context, word in LAMBADA]
    write_lines(folder / "lambada.jsonl", rows)
    rows = [{"context": c, "answer": a, "aliases": more} for c, a, more in TRIVIA]
    write_lines(folder / "triviaqa.jsonl", rows)
    write_lines(folder / "tydiqa.jsonl", tydi_rows())
    model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))


def _documents(task: str, folder: Path) -> object:
    return read_documents(task, folder / f"{task}.jsonl")


def _tokenizer(folder: Path) -> object:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    return tokenizer.eod, tokenizer.decode([0, 1, 2])


_SETS = [
    Kind(
        name=f"evaluation set: {task}",
        modules=("evaluation.task_data",),
        build=_build,
        file=f"{task}.jsonl",
        form="jsonl",
        read=partial(_documents, task),
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    )
    for task in ("lambada", "triviaqa", "tydiqa")
]
KINDS = [
    *_SETS,
    Kind(
        name="tokenizer",
        modules=("data.datasets.tokenizer",),
        build=_build,
        file="tokenizer.json",
        form="json",
        read=_tokenizer,
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    ),
]
