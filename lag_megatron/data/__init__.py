"""Text to batches: corpus, tokenizer, Megatron's bin/idx files, and samples by step."""

from lag_megatron.data.batches import Batch, TrainingData, ValidationData
from lag_megatron.data.corpus import Corpus, Document, open_corpus
from lag_megatron.data.feed import Feed
from lag_megatron.data.prepare import prepare_data
from lag_megatron.data.prepared import PreparedData
from lag_megatron.data.tokenizer import Tokenizer, load_tokenizer, padded_vocab_size, train_bpe

__all__ = [
    "Batch",
    "Corpus",
    "Document",
    "Feed",
    "PreparedData",
    "Tokenizer",
    "TrainingData",
    "ValidationData",
    "load_tokenizer",
    "open_corpus",
    "padded_vocab_size",
    "prepare_data",
    "train_bpe",
]
