"""Which architecture of transformers a model is, and its ``config.json``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lag_megatron.checkpoint.tensor_map import BERT, GPT2, LLAMA, Row
from lag_megatron.config import ModelConfig
from lag_megatron.errors import ConfigError

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model of transformers that one of ours can be written as.

    Attributes:
        name: its class.
        model_type: what ``config.json`` calls it.
        needs: by key of the configuration, the values that it can express; whatever is not named
            here, it can express.
        rows: which tensor is which.
        settings: entries of ``config.json`` beside those that all have.
        grouped_queries: whether several query heads may share a key head.
    """

    name: str
    model_type: str
    needs: Mapping[str, tuple[object, ...]]
    rows: Sequence[Row]
    settings: Callable[[ModelConfig, int], Settings]
    grouped_queries: bool

    def misfits(self, model: ModelConfig) -> list[str]:
        """What of a model it cannot express, each with its key."""
        found = [
            f"model.{key}: {' or '.join(map(str, allowed))} (got {getattr(model, key)})"
            for key, allowed in self.needs.items()
            if getattr(model, key) not in allowed
        ]
        if not self.grouped_queries and model.num_query_groups != model.num_attention_heads:
            found.append(
                f"model.num_query_groups: {model.num_attention_heads}, one a head "
                f"(got {model.num_query_groups})"
            )
        return found


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture that computes what the model computes.

    Raises:
        ConfigError: if there is none, naming what each would need.
    """
    lines = []
    for architecture in ARCHITECTURES:
        misfits = architecture.misfits(model)
        if not misfits:
            return architecture
        lines.append(f"  {architecture.name} needs {'; '.join(misfits)}")
    raise ConfigError(
        "no architecture of transformers computes what this model computes, so it cannot be "
        "written as one\n" + "\n".join(lines)
    )


def _gpt2(model: ModelConfig, num_layers: int) -> Settings:
    return {
        "n_positions": model.seq_length,
        "n_embd": model.hidden_size,
        "n_layer": num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "activation_function": {"gelu": "gelu_new", "gelu_exact": "gelu"}[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
    }


def _llama(model: ModelConfig, num_layers: int) -> Settings:
    return {
        "max_position_embeddings": model.seq_length,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropout,
    }


def _bert(model: ModelConfig, num_layers: int) -> Settings:
    return {
        "max_position_embeddings": model.seq_length,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.num_attention_heads,
        "type_vocab_size": model.token_types,
        "hidden_act": {"gelu": "gelu_new", "gelu_exact": "gelu"}[model.activation],
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
    }


ARCHITECTURES = (
    Architecture(
        name="GPT2LMHeadModel",
        model_type="gpt2",
        needs={
            "family": ("gpt",),
            "positions": ("learned",),
            "norm": ("layernorm",),
            "norm_position": ("pre",),
            "activation": ("gelu", "gelu_exact"),
            "bias": (True,),
        },
        rows=GPT2,
        settings=_gpt2,
        grouped_queries=False,
    ),
    Architecture(
        name="LlamaForCausalLM",
        model_type="llama",
        needs={
            "family": ("gpt",),
            "positions": ("rope",),
            "norm": ("rmsnorm",),
            "norm_position": ("pre",),
            "activation": ("swiglu",),
        },
        rows=LLAMA,
        settings=_llama,
        grouped_queries=True,
    ),
    Architecture(
        name="BertForMaskedLM",
        model_type="bert",
        needs={
            "family": ("bert",),
            "norm_position": ("post",),
            "activation": ("gelu", "gelu_exact"),
            "tied_embeddings": (True,),
            "token_types": (1, 2),
            "sentence_head": (False,),
        },
        rows=BERT,
        settings=_bert,
        grouped_queries=False,
    ),
)
