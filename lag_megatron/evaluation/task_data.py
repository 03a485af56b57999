"""The tasks' data: local files, read and checked as a whole before a model is loaded.

lambada   JSON lines, ``{"context": "...", "continuation": "word"}``
triviaqa  JSON lines, ``{"context": "Question: ...\\nAnswer:", "answer": "...", "aliases": []}``
tydiqa    gold passages as SQuAD's JSON or as JSON lines, ``{"id": "english-...", "context": "...",
          "question": "...", "answers": {"text": []}}``; or the primary task's JSON lines, from
          which gold passages are derived
wikitext  plain text whose articles begin with lines like `` = Title = ``

Any of them may be compressed (``.gz``).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lag_megatron.errors import DataError
from lag_megatron.evaluation.tydiqa import Json, gold_passages
from lag_megatron.small_files import parse_json, read_text

# What a folder of data is searched for.
PATTERNS = {
    "lambada": ("lambada*.jsonl", "lambada*.jsonl.gz"),
    "triviaqa": ("triviaqa*.jsonl", "triviaqa*.jsonl.gz"),
    "tydiqa": ("tydiqa*.json", "tydiqa*.jsonl", "tydiqa*.json.gz", "tydiqa*.jsonl.gz"),
    "wikitext": ("wikitext*.txt", "wikitext*.txt.gz", "wikitext*.tokens", "wiki*.raw"),
}
FORMS = {
    "lambada": 'lines of {"context": "...", "continuation": "word"}',
    "triviaqa": 'lines of {"context": "Question: ...\\nAnswer:", "answer": "...", "aliases": []}',
    "tydiqa": 'SQuAD-like {"context", "question", "answers"}, or lines of the primary task',
    "wikitext": "text whose articles begin with lines like ' = Title = '",
}
TASKS = tuple(PATTERNS)
_SHOTS = {"lambada": 1, "triviaqa": 1, "tydiqa": 1, "wikitext": 0}
_HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Documents:
    """A task's items, and how many of the file's were passed over, by reason."""

    items: list[Json]
    passed_over: Counter[str] = field(default_factory=Counter)


def find_file(task: str, folders: Sequence[Path]) -> Path:
    """The task's file in folders of data.

    Raises:
        DataError: if there is none, or more than one.
    """
    patterns = PATTERNS[task]
    found = sorted({path for f in folders for pattern in patterns for path in f.glob(pattern)})
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} files ({', '.join(p.name for p in found[:3])})" if found else "no file"
    raise DataError(
        f"{' '.join(map(str, folders))}: {what} for the task {task}: expected one named "
        f"{' or '.join(patterns)}, {FORMS[task]}. Name the file itself with --data {task}=FILE, or "
        "leave the task out."
    )


def read_documents(task: str, path: Path) -> Documents:
    """Read a task's file.

    Raises:
        DataError: if it is missing, of another form, or has too few items for the task.
    """
    text = read_text(path, what=f"data of the task {task}, {FORMS[task]}", error=DataError)
    try:
        documents = _READERS[task](text)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: not of the form that the task {task} takes: {_reason(error)}. "
            f"Expected {FORMS[task]}."
        ) from None
    needed = 1 + _SHOTS[task]
    different = len({json.dumps(item, sort_keys=True) for item in documents.items})
    if different < needed:
        passed = ", ".join(f"{n} {reason}" for reason, n in documents.passed_over.items())
        raise DataError(
            f"{path}: {different} items that differ for the task {task}, expected at least {needed}"
            f" (an item's example is another one){f'; passed over: {passed}' if passed else ''}. "
            f"Expected {FORMS[task]}."
        )
    return documents


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, LookupError) else str(error)


def _rows(text: str) -> list[Json]:
    """The objects of JSON lines, or the one of a JSON file."""
    first = text.lstrip().partition("\n")[0].rstrip()
    if first.startswith("{") and not first.endswith(
        "}"
    ):  # the file is one object over several lines
        return [_object(text, "the file")]
    lines = enumerate(text.split("\n"), start=1)
    return [_object(line, f"line {number}") for number, line in lines if line.strip()]


def _object(text: str, where: str) -> Json:
    found: Json = parse_json(text, where=where, what="a JSON object", error=DataError)
    return found


def _string(row: Json, key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} is no text: {value!r}")
    return value


def _lambada(text: str) -> Documents:
    return Documents(
        [
            {
                "context": _string(row, "context").rstrip(),
                "continuation": _string(row, "continuation").strip(),
            }
            for row in _rows(text)
        ]
    )


def _triviaqa(text: str) -> Documents:
    items = []
    for row in _rows(text):
        aliases = row.get("aliases", [])
        if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
            raise ValueError(f"'aliases' is no list of texts: {aliases!r}")
        answers = list(dict.fromkeys([_string(row, "answer"), *aliases]))
        items.append({"context": _string(row, "context").rstrip(), "answers": answers})
    return Documents(items)


def _tydiqa(text: str) -> Documents:
    return Documents(*gold_passages(_rows(text)))


def _wikitext(text: str) -> Documents:
    starts = [match.start() for match in _HEADING.finditer(text)]
    if not starts:
        raise ValueError("no line like ' = Title = '")
    ends = [*starts[1:], len(text)]
    return Documents([{"page": text[a:b]} for a, b in zip(starts, ends, strict=True)])


_READERS: dict[str, Callable[[str], Documents]] = {
    "lambada": _lambada,
    "triviaqa": _triviaqa,
    "tydiqa": _tydiqa,
    "wikitext": _wikitext,
}


def _dataset(task: str, data: dict[str, str]) -> dict[str, Any]:
    import datasets

    items = read_documents(task, Path(data[task])).items
    return {"test": datasets.Dataset.from_list(items)}


# What the harness calls: ``data`` is the file of each task, from its ``metadata``.


def lambada(*, data: dict[str, str], **unused: Any) -> dict[str, Any]:
    """The split ``test`` of context and continuation."""
    return _dataset("lambada", data)


def triviaqa(*, data: dict[str, str], **unused: Any) -> dict[str, Any]:
    """The split ``test`` of context and answers."""
    return _dataset("triviaqa", data)


def tydiqa(*, data: dict[str, str], **unused: Any) -> dict[str, Any]:
    """The split ``test`` of context, question and answers."""
    return _dataset("tydiqa", data)


def wikitext(*, data: dict[str, str], **unused: Any) -> dict[str, Any]:
    """The split ``test`` of pages."""
    return _dataset("wikitext", data)
