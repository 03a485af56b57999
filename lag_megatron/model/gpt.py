"""Megatron-Core's GPT model from our configuration."""

from megatron.core.models.gpt import GPTModel

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.transformer import block_spec, transformer_config


def build_gpt(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int, vocab_size: int
) -> GPTModel:
    """This tensor-parallel rank's part of a model, on the CPU, its weights not yet drawn."""
    return GPTModel(
        config=transformer_config(model, parallel, num_layers=num_layers),
        transformer_layer_spec=block_spec(model, num_layers=num_layers),
        vocab_size=vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
        rotary_base=model.rotary_base,
    )
