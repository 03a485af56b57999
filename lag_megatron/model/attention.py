"""Core attention: torch's scaled dot product, or matmuls on a CPU with matrix instructions.

Masks are booleans, True where attention is hidden, as Megatron's are.
"""

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lag_megatron.kernels.cpu.attention_cpu import attend_cpu, one_pass_softmax


def prefix_mask(prefix_length: Tensor, length: int) -> Tensor:
    """The mask of a batch's last rows, those that begin with a prefix, bool (n, 1, s, s).

    Rows before them need none: the attention applies a mask of n rows to the batch's last n rows,
    also in recomputation, which passes the mask along.

    Args:
        prefix_length: int64 (n,); positions below it see each other in both directions.
        length: s, of the sequences.
    """
    place = torch.arange(length, device=prefix_length.device)
    later = place[None, :] > place[:, None]
    beyond = place[None, :] >= prefix_length[:, None]
    return (later & beyond[:, None, :])[:, None]


def padding_mask(is_token: Tensor) -> Tensor:
    """The mask that hides padding from all positions, bool (b, 1, 1, s).

    Args:
        is_token: bool (b, s), False where a row is padded.
    """
    return ~is_token[:, None, None, :]


class SDPACoreAttention(MegatronModule):
    """Causal or full attention of Megatron's spec slot ``core_attention``.

    Letters: s sequence, b batch, h query heads and g key-value heads of this rank, k head size.
    """

    use_matmul = True  # where prefers_matmul_attention agrees

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
        known = (AttnMaskType.causal, AttnMaskType.padding)
        if attn_mask_type not in known or attention_type != "self":
            raise NotImplementedError(f"{attention_type} attention with {attn_mask_type}")
        self.causal = attn_mask_type is AttnMaskType.causal
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
        """Attention output of shape (s, b, h * k).

        Causal attention takes the mask of :func:`prefix_mask`, full attention that of
        :func:`padding_mask`.
        """
        heads = [t.permute(1, 2, 0, 3) for t in (query_sbhk, key_sbgk, value_sbgk)]
        with self._random_stream():
            if not self.causal or attention_mask is None:
                return _to_sequence(self._attend(heads, attention_mask))
            plain = query_sbhk.shape[1] - len(attention_mask)
            parts = [self._attend([t[plain:] for t in heads], attention_mask)]
            if plain:
                parts.insert(0, self._attend([t[:plain] for t in heads], None))
            return _to_sequence(torch.cat(parts))

    def _attend(self, heads: list[Tensor], hidden: Tensor | None) -> Tensor:
        query, key, value = heads
        if self.use_matmul and self.training and prefers_matmul_attention(query):
            return matmul_attention(
                query,
                key,
                value,
                hidden,
                causal=self.causal and hidden is None,
                scale=self.softmax_scale or query.shape[-1] ** -0.5,
                dropout=self.dropout,
            )
        grouped = key.shape[1] != query.shape[1]
        if grouped and hidden is not None:
            # On CUDA no kernel takes both a mask and groups but the slow one that holds all scores.
            repeats = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and hidden is None,
            scale=self.softmax_scale,
            enable_gqa=grouped and hidden is None,
        )

    def _random_stream(self) -> contextlib.AbstractContextManager[None]:
        """Heads are spread over tensor-parallel ranks, so that each needs its own stream.

        Under sequence parallelism the whole block draws from it already.
        """
        if self.training and self.dropout and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def matmul_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    *,
    scale: float,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention whose scores exist whole: two batched products each way, without recomputation.

    The backward of torch's own recomputes the scores in small blocks, for which a CPU with matrix
    instructions has no use.

    Args:
        query: (b, h, s, k).
        key: (b, g, s, k), and so is ``value``; h is a multiple of g.
        hidden: bool, broadcast to (b, h, s, s); None hides nothing.
        causal: whether what comes after a position is hidden from it, in place of ``hidden``.
        scale: of the scores.
        dropout: share of the attention weights that is dropped.

    Returns:
        (b, h, s, k).
    """
    if not dropout and one_pass_softmax(query):
        return attend_cpu(query, key, value, hidden, causal=causal, scale=scale)
    batch, count, length, size = query.shape
    if causal:
        hidden = _future(length)
    groups = key.shape[1]
    # The query heads of a group lie one below the other, so that none of its keys is repeated.
    query = (query * scale).reshape(batch, groups, -1, size)
    scores = (query @ key.transpose(2, 3)).view(batch, count, length, -1)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    weights = F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0)
    out: Tensor = weights.view(batch, groups, -1, weights.shape[-1]) @ value
    return out.view(batch, count, length, size)


def prefers_matmul_attention(query: Tensor) -> bool:
    """Whether :func:`matmul_attention` is faster in training, for a query (b, h, s, k).

    By what the CPU can do and not by a trial, since a run has to go on with the same numbers; the
    lengths are those of ``tools/bench/training/attention.py``'s committed table.
    """
    return (
        query.device.type == "cpu"
        and query.dtype is torch.bfloat16
        and query.shape[2] <= 512
        and torch.cpu._is_amx_tile_supported()
    )


@functools.lru_cache(maxsize=8)
def _future(length: int) -> Tensor:
    """The mask of causal attention, bool (s, s)."""
    return torch.ones(length, length, dtype=torch.bool).triu_(1)


def _to_sequence(out_bhsk: Tensor) -> Tensor:
    return out_bhsk.permute(2, 0, 1, 3).flatten(2)
