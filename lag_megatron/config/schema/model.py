"""The shape of the model."""

from dataclasses import dataclass
from typing import Literal

from lag_megatron.config.schema.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the transformer; names are Megatron's.

    Attributes:
        family: ``gpt`` is a decoder on Megatron-Core's GPTModel, ``bert`` its BertModel.
        num_layers: transformer layers of the first stage; above 0.
        hidden_size: width of the residual stream, a multiple of ``num_attention_heads``; above 0.
        ffn_hidden_size: width inside the MLP, a multiple of ``parallel.tensor``; above 0.
        num_attention_heads: query heads, a multiple of ``num_query_groups``; above 0.
        num_query_groups: key and value heads, a multiple of ``parallel.tensor``; above 0.
        seq_length: tokens of a sample; above 0.
        vocab_size: rows of the embedding; ``auto`` is the tokenizer's size, padded to 128.
        positions: learned absolute positions, or rotary ones.
        rotary_base: base of the rotary frequencies; above 0.
        norm: the kind of all norms.
        norm_eps: added to the variance in norms; above 0.
        norm_position: ``post`` is Devlin et al.'s BERT, ``pre`` Megatron's.
        activation: ``gelu`` is the tanh approximation (GPT-2), ``gelu_exact`` the erf (BERT).
        bias: whether linear layers have a bias.
        tied_embeddings: whether the output layer shares the embedding's weights.
        token_types: rows of BERT's segment embedding, 0 for none; 0 or more.
        sentence_head: BERT's pooler and the head that classifies pairs of segments.
        dropout: probability of attention and hidden dropout; in [0, 1).
        label_smoothing: share of a token's target that is spread evenly over the vocabulary, in
            the training loss alone; in [0, 1).
        z_loss: coefficient of the squared log of the softmax's sum (PaLM takes 1e-4), in the
            training loss alone; 0 or more.
        init_std: standard deviation of new weights; above 0.
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
