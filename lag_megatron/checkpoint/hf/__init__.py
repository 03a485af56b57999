"""Directories of transformers: names, tensors, tokenizer files, reading and writing."""
