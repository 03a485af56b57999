"""The shape of the model."""

from dataclasses import dataclass
from typing import Literal

from lag_megatron.config.schema.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the transformer; names are Megatron's.

    Attributes:
        norm_position: ``post`` is Devlin et al.'s BERT, ``pre`` Megatron's.
        activation: ``gelu`` is the tanh approximation (GPT-2), ``gelu_exact`` the erf (BERT).
        token_types: rows of BERT's segment embedding; 0 has none.
        sentence_head: BERT's pooler and the head that classifies pairs of segments.
        label_smoothing: share of a token's target that is spread evenly over the vocabulary.
        z_loss: coefficient of the squared log of the softmax's sum, as of PaLM (1e-4 there).  Both
            are in the training loss alone; a validation loss is the cross-entropy.
    """

    __pydantic_config__ = FORBID
    family: Literal["gpt", "bert"] = "gpt"
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    seq_length: int
    vocab_size: int | Literal["auto"] = "auto"
    positions: Literal["learned", "rope"] = "learned"
    rotary_base: int = 10000
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_position: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    bias: bool = True
    tied_embeddings: bool = True
    token_types: int = 0
    sentence_head: bool = False
    dropout: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    init_std: float = 0.02


def padded_vocab_size(vocab_size: int) -> int:
    """Round up to a multiple of 128, Megatron's ``--make-vocab-size-divisible-by``."""
    return -(-vocab_size // 128) * 128
