"""The transformers architecture of a model, and conversion of its ``config.json`` both ways."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lag_megatron.checkpoint.hf.tensor_map import BERT, GPT2, LLAMA, TensorMapping
from lag_megatron.config import ModelConfig
from lag_megatron.errors import CheckpointError, ConfigError
from lag_megatron.small_files import read_json

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A transformers model class that models can be exported to and imported from.

    Attributes:
        name: the class.
        model_type: its ``model_type`` in ``config.json``.
        needs: for keys of ``ModelConfig``, the values that the class supports; all values of other
            keys are supported.
        mappings: of its tensors to Megatron-Core's.
        names: keys of ``config.json`` with the ``ModelConfig`` key of the same value.
        activation: the ``config.json`` key of the activation's name.
        activations: names in ``ModelConfig`` with those in ``config.json``.
        expects: further ``config.json`` entries that are required on import.
        extra: ``config.json`` entries that are computed from the ``ModelConfig``.
        extra_model: ``ModelConfig`` entries that are computed from ``config.json``.
        grouped_queries: whether several query heads may share a key head.
        ignored: patterns of tensors that files may have and the model does not use: buffers of
            older versions, further names of tied weights, heads of other tasks.
        prefix: prefix of tensor names that files of the bare model leave out.
    """

    name: str
    model_type: str
    needs: Mapping[str, tuple[object, ...]]
    mappings: Sequence[TensorMapping]
    names: Mapping[str, str]
    activation: str
    activations: Mapping[str, str]
    expects: Mapping[str, object]
    extra: Callable[[ModelConfig], Settings]
    extra_model: Callable[[Settings], Settings]
    grouped_queries: bool
    ignored: tuple[str, ...]
    prefix: str

    def misfits(self, model: ModelConfig) -> list[str]:
        """The settings of a model that the class does not support, each with its key."""
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

    def settings(self, model: ModelConfig, num_layers: int) -> Settings:
        """Entries of ``config.json`` that depend on the architecture."""
        values = {theirs: getattr(model, ours) for theirs, ours in self.names.items()}
        layers = next(theirs for theirs, ours in self.names.items() if ours == "num_layers")
        values |= {layers: num_layers, self.activation: self.activations[model.activation]}
        return values | self.extra(model)

    def model(self, settings: Settings) -> Settings:
        """The ``ModelConfig`` entries of a ``config.json``.

        Args:
            settings: all of ``config.json``, with the defaults of its class.

        Raises:
            ConfigError: naming every entry that is not supported.
        """
        problems = list(self._unreadable(settings))
        if problems:
            raise ConfigError(f"{self.name}: not computed here: {'; '.join(problems)}")
        always = {key: allowed[0] for key, allowed in self.needs.items() if len(allowed) == 1}
        ours = {there: here for here, there in self.activations.items()}
        values: Settings = always | {ours: settings[theirs] for theirs, ours in self.names.items()}
        values["activation"] = ours[settings[self.activation]]
        values |= self.extra_model(settings)
        values["init_std"] = settings["initializer_range"]
        values["tied_embeddings"] = settings["tie_word_embeddings"]
        values.setdefault("num_query_groups", values["num_attention_heads"])
        if values["ffn_hidden_size"] is None:  # GPT-2's default
            values["ffn_hidden_size"] = 4 * values["hidden_size"]
        return values

    def _unreadable(self, settings: Settings) -> Iterator[str]:
        for key, expected in self.expects.items():
            if settings.get(key, expected) != expected:
                yield f"{key}: {settings[key]!r}, expected {expected!r}"
        if settings[self.activation] not in self.activations.values():
            known = " or ".join(map(repr, self.activations.values()))
            yield f"{self.activation}: {settings[self.activation]!r}, expected {known}"
        for ours in dict.fromkeys(self.names.values()):
            keys = [theirs for theirs, name in self.names.items() if name == ours]
            if any(settings[key] != settings[keys[0]] for key in keys):
                found = ", ".join(f"{key} {settings[key]}" for key in keys)
                yield f"{found}: expected one value"


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture that computes the same function as the model.

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


def _nothing(model: ModelConfig | Settings) -> Settings:
    return {}


def _llama(model: ModelConfig) -> Settings:
    return {
        "head_dim": model.hidden_size // model.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
    }


def _of_llama(settings: Settings) -> Settings:
    rope, heads = settings["rope_parameters"], settings["num_attention_heads"]
    if rope.get("rope_type") != "default":
        raise ConfigError(f"LlamaForCausalLM: rope_type {rope['rope_type']!r}, expected 'default'")
    if settings["head_dim"] * heads != settings["hidden_size"]:
        raise ConfigError(
            f"LlamaForCausalLM: head_dim {settings['head_dim']} times {heads} heads is not the "
            f"hidden_size {settings['hidden_size']}"
        )
    base = rope["rope_theta"]
    if base != int(base):
        raise ConfigError(f"LlamaForCausalLM: rope_theta {base}, expected a whole number")
    return {"rotary_base": int(base)}


_GELU = {"gelu": "gelu_new", "gelu_exact": "gelu"}
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
        mappings=GPT2,
        names={
            "n_positions": "seq_length",
            "n_embd": "hidden_size",
            "n_layer": "num_layers",
            "n_head": "num_attention_heads",
            "n_inner": "ffn_hidden_size",
            "layer_norm_epsilon": "norm_eps",
            "resid_pdrop": "dropout",
            "embd_pdrop": "dropout",
            "attn_pdrop": "dropout",
        },
        activation="activation_function",
        activations=_GELU,
        expects={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        extra=_nothing,
        extra_model=_nothing,
        grouped_queries=False,
        ignored=(r"\.attn\.(masked_)?bias$",),
        prefix="transformer.",
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
        mappings=LLAMA,
        names={
            "max_position_embeddings": "seq_length",
            "hidden_size": "hidden_size",
            "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_attention_heads",
            "num_key_value_heads": "num_query_groups",
            "rms_norm_eps": "norm_eps",
            "attention_bias": "bias",
            "mlp_bias": "bias",
            "attention_dropout": "dropout",
        },
        activation="hidden_act",
        activations={"swiglu": "silu"},
        expects={},
        extra=_llama,
        extra_model=_of_llama,
        grouped_queries=True,
        ignored=(r"\.rotary_emb\.inv_freq$",),
        prefix="model.",
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
        mappings=BERT,
        names={
            "max_position_embeddings": "seq_length",
            "hidden_size": "hidden_size",
            "intermediate_size": "ffn_hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_attention_heads",
            "type_vocab_size": "token_types",
            "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "dropout",
        },
        activation="hidden_act",
        activations=_GELU,
        expects={"is_decoder": False, "add_cross_attention": False},
        extra=_nothing,
        extra_model=_nothing,
        grouped_queries=False,
        ignored=(
            r"embeddings\.position_ids$",
            r"^bert\.pooler\.",
            r"^cls\.seq_relationship\.",
        ),
        prefix="bert.",
    ),
)


def read_config(path: Path) -> Settings:
    """All entries of ``config.json`` with the defaults of its class.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    import transformers  # takes seconds, which only describing a checkpoint should not

    read_json(  # the library below would say less of a file that is damaged
        path / "config.json",
        what="settings of a transformers model",
        error=CheckpointError,
        advice="Restore it from a copy.",
    )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(f"{path / 'config.json'}: cannot be read: {line}") from None
    return dict(config.to_dict())
