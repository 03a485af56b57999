"""The model and how it is spread over ranks."""

from dataclasses import dataclass
from typing import Literal

from lag_megatron.config.base import FORBID


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the transformer; names are Megatron's.

    Attributes:
        norm_position: ``post`` is Devlin et al.'s BERT, ``pre`` Megatron's.
        activation: ``gelu`` is the tanh approximation (GPT-2), ``gelu_exact`` the erf (BERT).
        token_types: rows of the embedding that tells BERT's segments apart; 0 has none.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the work is spread; batches are counted in sequences.

    ``world_size`` is only needed by a dry run without a hostfile; a run takes it from its launcher
    and refuses a different one.

    Attributes:
        sequence_parallel: between matrices that tensor parallelism cuts, each of its ranks holds a
            part of the sequence (Korthikanti et al. 2022); the same losses for less memory.
        recompute: ``layers`` keeps each layer's input alone and computes the rest again in the
            backward pass.
        cuda_graphs: the launches of a transformer layer are recorded once and replayed, with more
            memory; for steps so short that a GPU waits for its host.
    """

    __pydantic_config__ = FORBID
    tensor: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch: int = 8
    global_batch: int = 32
    precision: Literal["fp32", "bf16"] = "fp32"
    sequence_parallel: bool = False
    recompute: Literal["none", "layers"] = "none"
    cuda_graphs: bool = False
    world_size: int | None = None
    timeout: float = 300.0


def padded_vocab_size(vocab_size: int) -> int:
    """Round up to a multiple of 128, Megatron's ``--make-vocab-size-divisible-by``."""
    return -(-vocab_size // 128) * 128
