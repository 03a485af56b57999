"""BERT on Megatron-Core's model, with heads that compute the predicted positions alone."""

import copy
from collections import OrderedDict

import torch
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.bert.pooler import Pooler
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer
from torch import Tensor

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.attention import padding_mask
from lag_megatron.model.linear_cross_entropy import LossLinear
from lag_megatron.model.transformer import TorchNorm, block_spec, transformer_config


def build_bert(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int, vocab_size: int
) -> "Bert":
    """This tensor-parallel rank's part of a model, on the CPU, its weights not yet drawn."""
    config = transformer_config(model, parallel, num_layers=num_layers)
    return Bert(model, config, vocab_size=vocab_size)


class Bert(BertModel):
    """Megatron-Core's encoder; its heads are built here, since they see other positions.

    With post-norm layers (Devlin et al. 2019) the embeddings are normed and the encoder's output is
    not; with pre-norm ones it is as in Megatron.  Parameters have Megatron's names.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, *, vocab_size: int) -> None:
        super().__init__(
            config=config,
            num_tokentypes=model.token_types,
            transformer_layer_spec=block_spec(model, num_layers=config.num_layers),
            vocab_size=vocab_size,
            max_sequence_length=model.seq_length,
            post_process=False,
            share_embeddings_and_output_weights=model.tied_embeddings,
            add_binary_head=model.sentence_head,
        )
        size, eps = config.hidden_size, config.layernorm_epsilon
        if model.norm_position == "post":
            parts = OrderedDict(
                layernorm=TorchNorm(config, size, eps), dropout=self.embedding.embedding_dropout
            )
            self.embedding.embedding_dropout = torch.nn.Sequential(parts)
        else:  # Megatron leaves it to the stage that has the heads
            self.encoder.final_layernorm = TorchNorm(config, size, eps)
        self.post_process = True
        self._build_heads(config, tied=model.tied_embeddings)
        LossLinear.adopt(self.output_layer, model)

    def _build_heads(self, config: TransformerConfig, *, tied: bool) -> None:
        # Every tensor-parallel rank has all predicted positions: see forward.
        config = copy.copy(config)
        config.sequence_parallel = False
        size = config.hidden_size
        self.lm_head = BertLMHead(size, config)
        self.lm_head.gelu = config.activation_func
        self.output_layer = ColumnParallelLinear(
            size,
            self.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_weight_param_allocation=tied,
        )
        self.binary_head = None
        if self.add_binary_head:
            self.binary_head = get_linear_layer(size, 2, config.init_method, False)
            self.pooler = Pooler(size, config.init_method, config)

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        return "b11s"  # Megatron's own check asks Transformer Engine for its version

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        token_types: Tensor,
        is_token: Tensor | None,
        masked_positions: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss or logits of the predicted positions, and logits of the sentence head.

        Args:
            tokens: int64 (b, s); so are ``position_ids`` and ``token_types``.
            is_token: bool (b, s), False at padding; None where there is none.
            masked_positions: int64 (b, m), what is predicted; None predicts all s positions.
            labels: int64 (b, m); None asks for logits.
            loss_mask: fp32 (b, m), the weight of each label; None asks for the labels' losses.

        Returns:
            The weighted sum of losses, losses (b, m), or this rank's logits (b, m, vocabulary /
            tensor); and (b, 2), or None for a model without a sentence head.
        """
        hidden_sbd = self.encoder(
            hidden_states=self.embedding(
                input_ids=tokens,
                position_ids=position_ids,
                tokentype_ids=token_types if self.embedding.num_tokentypes else None,
            ),
            attention_mask=None if is_token is None else padding_mask(is_token),
        )
        if self.config.sequence_parallel:
            hidden_sbd = gather_from_sequence_parallel_region(
                hidden_sbd, tensor_parallel_output_grad=False
            )
        sentence = None if self.binary_head is None else self.binary_head(self.pooler(hidden_sbd))
        if masked_positions is not None:
            index_mbd = masked_positions.t()[..., None].expand(-1, -1, hidden_sbd.shape[-1])
            hidden_sbd = hidden_sbd.gather(0, index_mbd)
        weight = self.embedding.word_embeddings.weight if self._tied else None
        found, _ = self.output_layer(
            self.lm_head(hidden_sbd), weight=weight, labels=labels, loss_mask=loss_mask
        )
        if loss_mask is not None:
            return found, sentence
        if labels is None:
            return found.transpose(0, 1), sentence
        return self.compute_language_model_loss(labels, found), sentence

    @property
    def _tied(self) -> bool:
        return bool(self.share_embeddings_and_output_weights)
