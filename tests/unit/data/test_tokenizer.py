"""Tokenizers with the special tokens of masked and UL2 samples; documents as sentences."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from sample_text import stories

from lag_megatron.config import TokenizerConfig
from lag_megatron.data.datasets import tokenizer as module
from lag_megatron.data.datasets.sentences import split_sentences
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.prepare.train_tokenizer import train_bpe, train_tokenizer, train_wordpiece
from lag_megatron.errors import DataError

STORIES = stories(30)
TEXT = (
    "Größer is better. The model grew! Did it? yes (it did.) And e.g. this\n\n  def f(x):\r\n\tx\n"
)


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    return train_wordpiece([*STORIES, TEXT], vocab_size=200, lowercase=True, sentinels=3)


def test_sentences_end_at_marks_and_lines() -> None:
    assert split_sentences(TEXT) == [
        "Größer is better.", "The model grew!", "Did it? yes (it did.)", "And e.g. this",
        "def f(x):", "x",
    ]  # fmt: skip
    assert split_sentences("他说。「好。」她笑了。") == ["他说。", "「好。」", "她笑了。"]
    assert split_sentences('He said "no." Then left... 3 days later.') == [
        'He said "no."', "Then left...", "3 days later.",
    ]  # fmt: skip
    assert split_sentences(" \n\t\n") == split_sentences("") == []


def test_wordpiece_has_berts_tokens_and_keeps_whole_words(wordpiece: Tokenizer) -> None:
    special = [wordpiece.inv_vocab[number] for number in range(5)]
    assert special == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (wordpiece.padding, wordpiece.cls, wordpiece.sep, wordpiece.mask) == (0, 2, 3, 4)
    assert wordpiece.eod == wordpiece.sep
    (ids,) = wordpiece.encode_documents(["The MODEL grew [MASK] <extra_id_0> [CLS]"])
    assert wordpiece.mask not in ids, "text that spells a special token is text"
    assert not set(ids[:-1].tolist()) & set(wordpiece.sentinels)
    assert wordpiece.decode(ids.tolist()).startswith("the model grew [")
    pieces = [wordpiece.inv_vocab[number] for number in ids.tolist()]
    starts = ~wordpiece.continues[ids]
    assert [piece.startswith("##") for piece in pieces] == (~starts).tolist()
    assert not set(wordpiece.words.tolist()) & {0, 1, 2, 3, 4, *wordpiece.sentinels}
    assert len(wordpiece.words) == wordpiece.vocab_size - 5 - 3 - 3


def test_case_is_kept_where_asked_for() -> None:
    cased = train_wordpiece(STORIES, vocab_size=200, lowercase=False)
    (ids,) = cased.encode_documents([STORIES[0]])
    assert cased.decode(ids.tolist()[:-1]).replace(" ", "") == STORIES[0].replace(" ", "")


def test_wordpiece_is_the_same_each_time(wordpiece: Tokenizer) -> None:
    """The library's trainer alone is not: its numbers depend on the order of a hash table."""
    again = train_wordpiece([*STORIES, TEXT], vocab_size=200, lowercase=True, sentinels=3)
    assert again.digest == wordpiece.digest


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_sentinels_and_modes_stand_at_the_end_and_are_kept(kind: str, tmp_path: Path) -> None:
    config = TokenizerConfig(type=kind, vocab_size=280, sentinels=4)
    made = train_tokenizer(config, STORIES)
    size = made.vocab_size - 7
    assert size <= 280
    assert made.sentinels == tuple(range(size, size + 4))
    assert made.modes == {"[R]": size + 4, "[S]": size + 5, "[X]": size + 6}
    made.save(tmp_path / "tokenizer.json")
    for wanted in (0, 3, 4):
        loaded = load_tokenizer(tmp_path / "tokenizer.json", sentinels=wanted)
        assert loaded.digest == made.digest
        assert (loaded.sentinels, loaded.modes, loaded.eod) == (
            made.sentinels, made.modes, made.eod,
        )  # fmt: skip
    more = load_tokenizer(tmp_path / "tokenizer.json", sentinels=6)
    assert more.sentinels == (*made.sentinels, made.vocab_size, made.vocab_size + 1)
    assert more.modes == made.modes


def test_a_file_gets_the_sentinels_that_it_lacks(tmp_path: Path) -> None:
    plain = train_bpe(STORIES, vocab_size=280)
    plain.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").digest == plain.digest
    assert plain.sentinels == ()
    assert plain.modes == {}
    grown = load_tokenizer(tmp_path / "tokenizer.json", sentinels=2)
    assert grown.sentinels == (plain.vocab_size, plain.vocab_size + 1)
    same = [list(made.encode_documents(STORIES[:3])) for made in (plain, grown)]
    assert all(np.array_equal(*pair) for pair in zip(*same, strict=True))


def test_ids_with_gaps_leave_no_room_for_sentinels(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0, "a": 1, "b": 5, "[UNK]": 6}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="share ids with others"):
        load_tokenizer(tmp_path / "tokenizer.json", sentinels=3)


def test_documents_as_sentences(wordpiece: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [TEXT * 3, "", "\n \n", "One. Two. Three."]
    whole = list(wordpiece.encode_documents(texts, sentences=True))
    assert [lengths for _, lengths in whole][1:3] == [[], []]
    for text, (ids, lengths) in zip(texts, whole, strict=True):
        assert ids.dtype == np.int64
        assert sum(lengths) == len(ids)
        sentences = np.split(ids, np.cumsum(lengths))[:-1]
        expected = [next(wordpiece.encode_documents([s]))[:-1] for s in split_sentences(text)]
        assert [part.tolist() for part in sentences] == [part.tolist() for part in expected]
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 10)
    for (left, some), (right, other) in zip(
        wordpiece.encode_documents(texts, sentences=True), whole, strict=True
    ):
        assert some == other
        assert np.array_equal(left, right)


def test_long_sentences_are_cut_between_words(wordpiece: Tokenizer) -> None:
    text = " ".join(STORIES[0].replace(".", "").split() * 20)
    ((ids, lengths),) = wordpiece.encode_documents([text], sentences=True)
    assert np.array_equal(ids, next(wordpiece.encode_documents([text]))[:-1])
    assert len(lengths) > 1
    assert all(100 < length <= 128 for length in lengths[:-1])
    assert not wordpiece.continues[ids[np.cumsum(lengths)[:-1]]].any()
    endless = "ab" * 45  # one word, of letters alone
    ((ids, lengths),) = wordpiece.encode_documents([f"{endless} {endless}"], sentences=True)
    assert max(lengths) <= 128
