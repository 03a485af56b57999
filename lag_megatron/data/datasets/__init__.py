"""Tokenized text on disk: Megatron's .bin/.idx files, prepared folders, mixtures, tokenizers."""
