"""Core attention through torch's scaled dot product, which is fast on CUDA and runs on a CPU."""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPACoreAttention(MegatronModule):
    """Causal attention of Megatron's spec slot ``core_attention``.

    Letters: s sequence, b batch, h query heads and g key-value heads of this rank, k head size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(f"{attention_type} attention with {attn_mask_type}")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_sbhk: Tensor,
        key_sbgk: Tensor,
        value_sbgk: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention output of shape (s, b, h * k)."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_sbhk, key_sbgk, value_sbgk))

        def attend(dropout: float) -> Tensor:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )

        if self.training and self.dropout:
            # Heads are spread over tensor-parallel ranks: each needs its own stream.
            with get_cuda_rng_tracker().fork():
                out_bhsk = attend(self.dropout)
        else:
            out_bhsk = attend(0.0)
        return out_bhsk.permute(2, 0, 1, 3).flatten(2)
