"""Tokenizers trained on a text: byte-level BPE and WordPiece."""

from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lag_megatron.config import TokenizerConfig
from lag_megatron.data.datasets.tokenizer import (
    CONTINUATION,
    END_OF_DOCUMENT,
    Tokenizer,
    add_sentinels,
)

_WORDPIECE_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MAX_ALPHABET = 1000


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a tokenizer of the type ``bpe`` or ``wordpiece``, with the sentinels asked for."""
    assert config.type in ("bpe", "wordpiece"), config.type
    if config.type == "bpe":
        return train_bpe(texts, vocab_size=config.vocab_size, sentinels=config.sentinels)
    return train_wordpiece(
        texts,
        vocab_size=config.vocab_size,
        lowercase=config.lowercase,
        sentinels=config.sentinels,
    )


def train_bpe(texts: Iterable[str], *, vocab_size: int, sentinels: int = 0) -> Tokenizer:
    """Train a byte-level BPE, the same one for the same texts in the same order.

    Args:
        texts: what to count pairs in.
        vocab_size: tokens at most, 256 bytes and the end of document included.
        sentinels: added after them, with UL2's mode tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    add_sentinels(backend, sentinels)
    return Tokenizer(backend, eod=backend.get_vocab()[END_OF_DOCUMENT])


def train_wordpiece(
    texts: Iterable[str], *, vocab_size: int, lowercase: bool, sentinels: int = 0
) -> Tokenizer:
    """Train BERT's WordPiece, the same one for the same texts in the same order.

    A document ends with [SEP]. Characters beyond the 1000 most common ones (a quarter of a small
    vocabulary) are unknown.

    Args:
        texts: what to count pairs in; all are held in memory.
        vocab_size: tokens at most, the five special ones and the alphabet included.
        lowercase: fold case and drop accents.
        sentinels: added after them, with UL2's mode tokens.
    """
    texts = list(texts)
    backend = _wordpiece({token: number for number, token in enumerate(_WORDPIECE_SPECIAL)})
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    alphabet = _alphabet(backend, texts, size=min(_MAX_ALPHABET, vocab_size // 4))
    # The trainer numbers characters inside words as its hash table happens to give them, and
    # breaks ties by number. Numbered beforehand, among the special tokens, they are the same in
    # every process.
    inner = [CONTINUATION + character for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_WORDPIECE_SPECIAL, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = _wordpiece(backend.get_vocab(with_added_tokens=True))
    made.normalizer = backend.normalizer
    made.add_special_tokens(_WORDPIECE_SPECIAL)
    add_sentinels(made, sentinels)
    return Tokenizer(made, eod=made.get_vocab()["[SEP]"])


def _wordpiece(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return backend


def _alphabet(backend: tokenizers.Tokenizer, texts: list[str], *, size: int) -> list[str]:
    """The most common characters of the texts as the tokenizer sees them, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(backend.normalizer.normalize_str(text))
    common = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted([character for character in common if not character.isspace()][:size])
