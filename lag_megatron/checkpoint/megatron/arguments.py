"""The ``ModelConfig`` of Megatron-LM's training arguments."""

import argparse
from dataclasses import asdict
from typing import Any

from lag_megatron.config import ModelConfig

# Arguments that change the function of the model in ways that are not supported here.
_UNKNOWN = ("num_experts", "squared_relu", "apply_layernorm_1p", "qk_layernorm",
            "rotary_interleaved", "multi_latent_attention", "use_rope_scaling",
            "rotary_seq_len_interpolation_factor")  # fmt: skip


def model_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The ``ModelConfig`` entries of a checkpoint's arguments; None if they cannot be expressed.

    Only the export to transformers needs them.
    """
    given = vars(arguments)
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    if any(not isinstance(given.get(key), int) for key in needed):
        return None
    heads = given["num_attention_heads"]
    is_bert = bool(given.get("bert_binary_head")) or "bert" in str(given.get("model_type", ""))
    groups = given.get("num_query_groups") if given.get("group_query_attention") else heads
    positions = {"rope": "rope", "learned_absolute": "learned"}.get(
        given.get("position_embedding_type", "learned_absolute")
    )
    norm = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}.get(
        given.get("normalization", "LayerNorm")
    )
    if any(given.get(key) for key in _UNKNOWN) or given.get("rotary_percent", 1.0) != 1.0:
        return None
    if given.get("kv_channels") not in (None, given["hidden_size"] // heads):
        return None
    plain = "gelu" if given.get("bias_gelu_fusion", True) else "gelu_exact"
    if is_bert or positions is None or norm is None or not isinstance(groups, int):
        return None
    model = ModelConfig(
        num_layers=given["num_layers"],
        hidden_size=given["hidden_size"],
        ffn_hidden_size=given["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        seq_length=given.get("max_position_embeddings") or given["seq_length"],
        vocab_size=given.get("padded_vocab_size") or "auto",
        positions=positions,  # type: ignore[arg-type]
        rotary_base=int(given.get("rotary_base", 10000)),
        norm=norm,  # type: ignore[arg-type]
        norm_eps=given.get("norm_epsilon", 1e-5),
        activation="swiglu" if given.get("swiglu") else plain,  # type: ignore[arg-type]
        bias=bool(given.get("add_bias_linear", True)),
        tied_embeddings=not given.get("untie_embeddings_and_output_weights", False),
        init_std=given.get("init_method_std", 0.02),
    )
    return asdict(model)
