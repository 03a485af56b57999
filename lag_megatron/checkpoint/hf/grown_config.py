"""``config.json`` of a transformers model whose layers were copied, added and reordered."""

from collections.abc import Mapping, Sequence
from typing import Any

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Lists with an entry for each layer.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "attention_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
)
# Lists of the numbers of some layers.
_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "hybrid_layer_ids")
# What a layer is depends on its number, which growth changes; with the value for which it does not.
_BY_NUMBER = {
    "first_k_dense_replace": 0,
    "attention_types": [],
    "attn_layer_period": 1,
    "expert_layer_period": 1,
    "decoder_sparse_step": 1,
    "no_rope_layer_interval": 0,
    "scale_attn_by_inverse_layer_idx": False,
}
# The same, unless `layer_types` says it for each layer.
_BY_NUMBER_WITHOUT_TYPES = (
    "sliding_window_pattern",
    "full_attention_interval",
    "max_window_layers",
)


class UnknownDepthError(ValueError):
    """It is not known what the configuration becomes; the message says why."""


def grown_config(
    config: Mapping[str, Any], *, source_layers: int, origins: Sequence[int]
) -> dict[str, Any]:
    """The configuration of the grown model.

    Args:
        config: of the source's model; of one with several parts, the text model's part changes.
        source_layers: how many layers the source has.
        origins: for each layer of the grown model, the source's layer that it comes from.

    Raises:
        UnknownDepthError: if it does not say that there are so many layers, or has settings for
            layers that are not known here.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping) and not any(key in config for key in DEPTH_KEYS):
        grown = grown_config(text, source_layers=source_layers, origins=origins)
        return {**config, "text_config": grown}
    _require_known(config, source_layers)
    new: dict[str, Any] = {key: len(origins) for key in DEPTH_KEYS if key in config}
    for key in _PER_LAYER:
        if config.get(key):
            new[key] = [config[key][origin] for origin in origins]
    for key in _NUMBERS:
        if config.get(key):
            new[key] = [layer for layer, origin in enumerate(origins) if origin in config[key]]
    return {**config, **new}


def _require_known(config: Mapping[str, Any], layers: int) -> None:
    if config.get("is_encoder_decoder"):
        raise UnknownDepthError("of an encoder and a decoder, either of which may have grown")
    depths = {key: config[key] for key in DEPTH_KEYS if key in config}
    if not depths or any(depth != layers for depth in depths.values()):
        said = ", ".join(f"{key} is {depth}" for key, depth in depths.items()) or "no depth"
        raise UnknownDepthError(f"it says {said}, the checkpoint has {layers} layers")
    for key, neutral in _BY_NUMBER.items():
        if config.get(key) not in (None, neutral):
            raise UnknownDepthError(f"its {key} goes by the layer's number")
    if not config.get("layer_types") and config.get("use_sliding_window", True):
        for key in _BY_NUMBER_WITHOUT_TYPES:
            if config.get(key):
                raise UnknownDepthError(f"its {key} goes by the layer's number")
    for key, value in config.items():
        if key in _PER_LAYER and value and not (isinstance(value, list) and len(value) == layers):
            raise UnknownDepthError(f"its {key} is no list of {layers} entries")
        if key in _NUMBERS and value and not isinstance(value, list):
            raise UnknownDepthError(f"its {key} is no list")
        is_list = isinstance(value, list) and len(value) == layers
        if is_list and "layer" in key and key not in (*_PER_LAYER, *_NUMBERS):
            raise UnknownDepthError(f"its {key} may have an entry for each layer")
