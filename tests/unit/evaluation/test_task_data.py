"""Files of downstream tasks: forms that are read, and what is said of others."""

import gzip
import json

import pytest
from evaluating import tydi_rows, write_tasks

from lag_megatron.errors import DataError
from lag_megatron.evaluation.task_data import find_file, read_documents

data = pytest.fixture(write_tasks, scope="module")


def primary(language, annotations):
    document = "Zebra é finch. It eats seed."
    spans = [(0, 15), (16, 29)]
    return {
        "language": language,
        "question_text": "What does it eat?",
        "document_plaintext": document,
        "passage_answer_candidates": [
            {"plaintext_start_byte": a, "plaintext_end_byte": b} for a, b in spans
        ],
        "annotations": [
            {
                "passage_answer": {"candidate_index": passage},
                "minimal_answer": {"plaintext_start_byte": a, "plaintext_end_byte": b},
            }
            for passage, a, b in annotations
        ],
    }


def test_gold_passages_are_derived_from_the_primary_task(tmp_path):
    rows = [
        primary("english", [(1, 24, 28), (-1, -1, -1), (1, 16, 28), (0, 0, 5)]),
        primary("english", [(1, -1, -1), (-1, -1, -1)]),
        primary("english", [(0, 6, 8)]),
        primary("thai", [(1, 24, 28)]),
    ]
    with gzip.open(tmp_path / "tydiqa-dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = read_documents("tydiqa", find_file("tydiqa", [tmp_path]))
    assert found.items == [
        {
            "context": "It eats seed.",
            "question": "What does it eat?",
            "answers": ["seed", "It eats seed"],
        },
        {"context": "Zebra é finch.", "question": "What does it eat?", "answers": ["é"]},
    ]
    assert found.passed_over == {"in another language": 1, "without a minimal answer": 1}


def test_nested_squad_files_are_read_too(data, tmp_path):
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [{"text": t, "answer_start": 0} for t in row["answers"]["text"]],
                }
            ],
        }
        for row in tydi_rows()
    ]
    path = tmp_path / "tydiqa.json"
    path.write_text(json.dumps({"version": "1", "data": [{"paragraphs": paragraphs}]}, indent=1))
    assert read_documents("tydiqa", path) == read_documents("tydiqa", data["tydiqa"])


BAD = {
    "missing": ("lambada", None, "no such file"),
    "not JSON": ("lambada", "{} {}", "line 1: .*cannot be read as JSON"),
    "a list": ("lambada", "[1]\n[2]", "line 1: .*it holds a list"),
    "no field": ("lambada", '{"context": "a"}', "no field 'continuation'"),
    "no text": ("triviaqa", '{"context": "a", "answer": 3}', "'answer' is no text: 3"),
    "aliases": ("triviaqa", '{"context": "a", "answer": "b", "aliases": "c"}', "'aliases' is no"),
    "one item": ("lambada", '{"context": "a", "continuation": "b"}', "1 items .* at least 2"),
    "no gold": ("tydiqa", json.dumps(tydi_rows()[2]), "0 items .* 1 in another language"),
    "no articles": ("wikitext", "some text", "no line like ' = Title = '"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_the_form_expected(case, tmp_path):
    task, text, message = BAD[case]
    path = tmp_path / "file.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_documents(task, path)
    assert str(path) in str(raised.value)
    assert "xpected " in str(raised.value)


def test_a_folder_needs_exactly_one_file_of_a_task(tmp_path):
    with pytest.raises(DataError, match="no file for the task lambada"):
        find_file("lambada", [tmp_path])
    for name in ("lambada-a.jsonl", "lambada-b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="2 files"):
        find_file("lambada", [tmp_path])
