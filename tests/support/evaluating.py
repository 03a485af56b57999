"""What the tests of evaluations share: a few items of each task, and their files."""

import json

from lag_megatron.evaluation.task_data import find_file

END = "<|endoftext|>"
LAMBADA = [("The dog ate the", "bone"), ("She read the", "book"), ('He said: "I never', "lie")]
TRIVIA = [
    ("Question: Which vegetable?\nAnswer:", "Onion", ["Bulb onion", "the J. R. Onions"]),
    ("Question: Which city?\nAnswer:", "Washington, D.C.", []),
    ("Question: Which beast?\nAnswer:", "Dik-dik", ["A dik dik"]),
]
TYDI = [
    ("english-1-0", "Finches eat seed.", "What do finches eat?", ["seed", "Seed."]),
    ("english-2-0", "It was 1920, in May.", "When was it?", ["1920", "1920, in May"]),
    ("finnish-3-0", "Se oli 1920.", "Milloin?", ["1920"]),
]
PAGES = [" = One = \n\n A b c .\n\n = = Sub = = \n\n d \n", " = Two words = \n e é f \n"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tydi_rows():
    return [
        {"id": i, "context": c, "question": q, "answers": {"text": a, "answer_start": [0]}}
        for i, c, q, a in TYDI
    ]


def write_tasks(tmp_path_factory):
    """A fixture: one file for each task, made here."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "lambada.jsonl", [{"context": c, "continuation": w} for c, w in LAMBADA])
    trivia = [{"context": c, "answer": a, "aliases": more} for c, a, more in TRIVIA]
    write_lines(folder / "triviaqa.jsonl", trivia)
    write_lines(folder / "tydiqa.jsonl", tydi_rows())
    (folder / "wikitext.txt").write_text(" \n" + "".join(PAGES), encoding="utf-8")
    tasks = ("lambada", "triviaqa", "tydiqa", "wikitext")
    return {task: find_file(task, [folder]) for task in tasks}
