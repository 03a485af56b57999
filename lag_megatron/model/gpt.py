"""Megatron-Core's GPT model from our configuration."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.linear_cross_entropy import LossLinear
from lag_megatron.model.transformer import block_spec, transformer_config


def build_gpt(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int, vocab_size: int
) -> "Gpt":
    """This tensor-parallel rank's part of a model, on the CPU, its weights not yet drawn."""
    built = Gpt(
        config=transformer_config(model, parallel, num_layers=num_layers),
        transformer_layer_spec=block_spec(model, num_layers=num_layers),
        vocab_size=vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
        rotary_base=model.rotary_base,
    )
    LossLinear.adopt(built.output_layer, model)
    return built


class Gpt(GPTModel):
    """Megatron-Core's decoder, which given labels and their weights returns one summed loss."""

    def _postprocess(
        self,
        hidden_states: Tensor,
        *arguments: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        if labels is None or loss_mask is None:
            rest |= {"labels": labels, "loss_mask": loss_mask}
            result: Tensor = super()._postprocess(hidden_states, *arguments, **rest)
            return result
        tied = self.share_embeddings_and_output_weights
        loss: Tensor = self.output_layer(
            hidden_states,
            weight=self.shared_embedding_or_output_weight() if tied else None,
            labels=labels,
            loss_mask=loss_mask,
        )[0]
        return loss
