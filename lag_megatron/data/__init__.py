"""From text to batches: ``prepare`` writes datasets, ``objectives`` draws samples from them."""

from lag_megatron.data.batch import Batch
from lag_megatron.data.datasets.blended_dataset import Prepared, PreparedMixture
from lag_megatron.data.datasets.prepared_dataset import PreparedData
from lag_megatron.data.datasets.tokenizer import Tokenizer, load_tokenizer
from lag_megatron.data.datasets.verification import DataVerification
from lag_megatron.data.global_batches import TrainingData, ValidationData
from lag_megatron.data.loader import BatchLoader
from lag_megatron.data.prepare.corpus import Corpus, open_corpus
from lag_megatron.data.prepare.prepare import open_prepared, prepare_data
from lag_megatron.data.prepare.train_tokenizer import train_bpe

__all__ = [
    "Batch",
    "BatchLoader",
    "Corpus",
    "DataVerification",
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
