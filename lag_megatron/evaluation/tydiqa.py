"""TyDi QA's English questions with their gold passages, from any of the published files.

The gold-passage task (Clark et al. 2020, section 3.1) gives the passage that holds the answer and
drops questions without one.  Its files are SQuAD-like: nested JSON, or rows of context, question
and answers.  From files of the primary task it is derived: the passage that annotators marked, and
their minimal answers in it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

Json = dict[str, Any]

_OTHER_LANGUAGES = frozenset(
    (
        "arabic",
        "bengali",
        "finnish",
        "indonesian",
        "japanese",
        "kiswahili",
        "korean",
        "russian",
        "swahili",
        "telugu",
        "thai",
    )
)


def gold_passages(rows: list[Json]) -> tuple[list[Json], Counter[str]]:
    """Items of context, question and answers, and how many were passed over, by reason.

    Args:
        rows: the objects of the file.

    Raises:
        LookupError, TypeError, ValueError: if a row is of neither form.
    """
    found: list[Json] = []
    passed: Counter[str] = Counter()
    for row in _flat(rows):
        item = _primary(row) if "annotations" in row else _secondary(row)
        if isinstance(item, str):
            passed[item] += 1
        else:
            found.append(item)
    return found, passed


def _flat(rows: list[Json]) -> Iterator[Json]:
    """SQuAD's nesting undone."""
    for row in rows:
        if "data" not in row:
            yield row
            continue
        for article in row["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {"context": paragraph["context"], **question}


def _secondary(row: Json) -> Json | str:
    if str(row.get("id", "")).partition("-")[0] in _OTHER_LANGUAGES:
        return "in another language"
    given = row["answers"]
    texts = given["text"] if isinstance(given, Mapping) else [_text(one) for one in given]
    answers = list(dict.fromkeys(str(text) for text in texts if str(text).strip()))
    if not answers:
        return "without an answer"
    return _item(row["context"], row["question"], answers)


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer["text"]


def _primary(row: Json) -> Json | str:
    if row["language"] != "english":
        return "in another language"
    document = row["document_plaintext"].encode()
    marked = [
        (one["passage_answer"]["candidate_index"], one["minimal_answer"])
        for one in row["annotations"]
        if one["minimal_answer"]["plaintext_start_byte"] >= 0
    ]
    if not marked:
        return "without a minimal answer"
    ((passage, _),) = Counter(index for index, _ in marked).most_common(1)
    if passage < 0:
        return "without a passage"
    answers = [_cut(document, span) for index, span in marked if index == passage]
    context = _cut(document, row["passage_answer_candidates"][passage])
    return _item(context, row["question_text"], list(dict.fromkeys(answers)))


def _cut(document: bytes, span: Mapping[str, int]) -> str:
    return document[span["plaintext_start_byte"] : span["plaintext_end_byte"]].decode()


def _item(context: str, question: str, answers: list[str]) -> Json:
    return {"context": context.strip(), "question": question.strip(), "answers": answers}
