"""From raw text to Megatron's .bin/.idx files: sources, tokenizing, building."""
