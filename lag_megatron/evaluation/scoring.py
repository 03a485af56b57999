"""Metrics whose published definitions differ from the harness's own."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TO_SPACES = str.maketrans({mark: " " for mark in string.punctuation + "\u2018\u2019\u00b4"})


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces.

    The normalisation of SQuAD's evaluation (Rajpurkar et al. 2016), which TyDi QA's gold-passage
    task shares.
    """
    return _bare(text.lower().translate(_PUNCTUATION))


def normalize_trivia(text: str) -> str:
    """As :func:`normalize`, but each mark becomes a space (TriviaQA: Joshi et al. 2017)."""
    return _bare(text.lower().translate(_TO_SPACES))


def exact_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the generated text is one of the answers after SQuAD's normalisation, else 0."""
    return _match(doc, results, normalize)


def trivia_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the generated text is one of the answers after TriviaQA's normalisation, else 0."""
    return _match(doc, results, normalize_trivia)


def _bare(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def _match(
    doc: Mapping[str, Any], results: Sequence[str], normalized: Callable[[str], str]
) -> dict[str, float]:
    (given,) = map(normalized, results)
    # An answer of nothing but an article normalizes to "", which an empty output would match.
    return {"exact_match": float(bool(given) and given in map(normalized, doc["answers"]))}


def perplexity_weights(
    doc: Mapping[str, Any], results: Sequence[float]
) -> dict[str, tuple[float, int]]:
    """The log-likelihood of an article in nats with its words and with its bytes."""
    (log_likelihood,) = results
    page = doc["page"]
    return {
        "word_perplexity": (log_likelihood, len(page.split())),
        "byte_perplexity": (log_likelihood, len(page.encode())),
    }
