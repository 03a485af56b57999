"""Hugging Face transformers directories: weights, configuration and tokenizer files."""
