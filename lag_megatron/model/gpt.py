"""Megatron-Core's GPT model from our configuration."""

import functools

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lag_megatron.config import ModelConfig, ParallelConfig
from lag_megatron.model.attention import SDPACoreAttention


def build_gpt(
    model: ModelConfig, parallel: ParallelConfig, *, num_layers: int, vocab_size: int
) -> GPTModel:
    """This tensor-parallel rank's part of a model, on the CPU, its weights not yet drawn."""
    config = _transformer_config(model, parallel, num_layers)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(model),
        vocab_size=vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
        rotary_base=model.rotary_base,
    )
    if model.positions == "rope" and not torch.cuda.is_available():
        gpt.rotary_pos_emb = _CpuRotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rotary_base,
            use_cpu_initialization=True,
        )
    return gpt


def _transformer_config(
    model: ModelConfig, parallel: ParallelConfig, num_layers: int
) -> TransformerConfig:
    is_bf16 = parallel.precision == "bf16"
    gated = model.activation == "swiglu"
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        tensor_model_parallel_size=parallel.tensor,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=F.silu if gated else functools.partial(F.gelu, approximate="tanh"),
        gated_linear_unit=gated,
        add_bias_linear=model.bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method_std=model.init_std,
        perform_initialization=False,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


def _layer_spec(model: ModelConfig) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = WrappedTorchNorm
    layer.self_attention.submodules.core_attention = SDPACoreAttention
    return spec


class _CpuRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding that stays on the CPU; Megatron's moves itself to a GPU."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]
