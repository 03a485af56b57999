"""Text to batches: sources, tokenizer, Megatron's bin/idx files, and samples by step."""

from lag_megatron.data.batches import Batch, TrainingData, ValidationData
from lag_megatron.data.blended_dataset import Prepared, PreparedMixture
from lag_megatron.data.loader import Feed
from lag_megatron.data.prepare.corpus import Corpus, open_corpus
from lag_megatron.data.prepare.prepare import open_prepared, prepare_data
from lag_megatron.data.prepare.train_tokenizer import train_bpe
from lag_megatron.data.prepared_dataset import PreparedData
from lag_megatron.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Feed",
    "Prepared",
    "PreparedData",
    "PreparedMixture",
    "Tokenizer",
    "TrainingData",
    "ValidationData",
    "load_tokenizer",
    "open_corpus",
    "open_prepared",
    "prepare_data",
    "train_bpe",
]
