"""What GPT and BERT share: Megatron-Core's configuration, layer specs and norms."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.attention import SDPACoreAttention
from lag_megatron.model.layer_dropping import DroppableLayer
from lag_megatron.model.mlp import one_pass_mlp

_ACTIVATIONS = {
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
    "swiglu": F.silu,
}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int
) -> TransformerConfig:
    """Megatron-Core's configuration for a model."""
    is_bf16 = parallel.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    recompute = parallel.recompute == "layers"
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method_std=model.init_std,
        perform_initialization=False,
        bf16=is_bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


def block_spec(model: ModelConfig, *, num_layers: int) -> TransformerBlockSubmodules:
    """Megatron-Core's layers with torch's attention and norms, and an activation in one pass."""
    layer = get_gpt_layer_local_spec(
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    )
    parts, is_post = layer.submodules, model.norm_position == "post"
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp if is_post else TorchNorm
    parts.self_attention.submodules.core_attention = SDPACoreAttention
    parts.mlp = one_pass_mlp(model.activation, parts.mlp.submodules)
    if model.family == "bert":
        parts.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    layer.module = PostNormLayer if is_post else DroppableLayer
    if is_post:
        parts.sharded_state_dict_keys_map = {}  # renames the norms that are not there
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers, layer_norm=None if is_post else TorchNorm
    )


class TorchNorm:
    """Torch's LayerNorm or RMSNorm, by the configuration.

    Megatron's own wrapper of them refuses sequence parallelism: there each rank norms its part of
    the sequence, so that the weights' gradients are parts too, and are marked as such.
    """

    # A class, because Megatron takes a function for a module that is built already.
    def __new__(  # type: ignore[misc]  # noqa: D102
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            vars(parameter)["sequence_parallel"] = config.sequence_parallel
        return norm


class PostNormLayer(DroppableLayer):
    """x = norm(x + attention(x)), then norm(x + mlp(x)) (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_attn_layernorm = TorchNorm(config, size, eps)
        self.post_mlp_layernorm = TorchNorm(config, size, eps)

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, context = super()._forward_attention(*args, **kwargs)
        return self.post_attn_layernorm(hidden), context

    def _forward_post_mlp(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.post_mlp_layernorm(super()._forward_post_mlp(*args, **kwargs))
