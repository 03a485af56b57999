"""Splitting a text into sentences by a regular expression."""

import re

# A mark that ends a sentence, closing quotes and brackets, white space, and what may begin the
# next: no small letter, so that "e.g. this" stays whole ("Mr. Smith" does not).
_END = re.compile(
    r"""(?:[.!?\u2026]+["'\u201d\u2019)\]]*\s+(?=[^\sa-z])|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019)\]]*\s*)"""
)


def split_sentences(text: str) -> list[str]:
    """Cut a text at its lines, and those at the ends of sentences.

    White space around a sentence is dropped, and so are sentences without anything else; nothing
    more is lost. Code, tables and verse keep their lines.

    Args:
        text: of any length; no sentence goes over the end of a line.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            found.append(line[start : end.end()].strip())
            start = end.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]
