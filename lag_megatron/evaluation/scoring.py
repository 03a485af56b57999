"""How an answer is scored, where the harness's own metrics are not the published ones."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and surplus blanks.

    The normalisation of SQuAD's evaluation (Rajpurkar et al. 2016), which TriviaQA and TyDi QA's
    gold-passage task share.
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the generated text is one of the answers after normalisation, else 0."""
    (given,) = results
    return {"exact_match": float(normalize(given) in map(normalize, doc["answers"]))}


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
