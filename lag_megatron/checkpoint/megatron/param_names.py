"""Conversion between parameters' names in a module and in Megatron-Core's distributed checkpoints.

Checkpoints store a norm under the linear layer after it, as Transformer Engine fuses them, and
stack the layers under one name along a first axis, unless they are numbered.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lag_megatron.checkpoint.state.box import Shape
from lag_megatron.errors import CheckpointError

# (name in the module, name in checkpoints), each followed by weight or bias.
_STORED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
# A parameter of a numbered layer, in Megatron-Core's names.
LAYER = re.compile(r"^(?P<head>.*\blayers\.)(?P<layer>\d+)(?P<tail>\..+)$")
_STACKED = re.compile(r"^(?P<head>.*\blayers\.)(?P<tail>(?!\d).+)$")
# Modules in the order in which Megatron-Core registers them, which is that of flat buffers.
_ORDER = (
    "embedding.word_embeddings",
    "embedding.position_embeddings",
    "embedding.tokentype_embeddings",
    "embedding.embedding_dropout.layernorm",
    "layers",
    "final_layernorm",
    "lm_head.dense",
    "lm_head.layer_norm",
    "output_layer",
    "binary_head",
    "pooler.dense",
)
_LAYER_ORDER = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "post_attn_layernorm",
    "post_mlp_layernorm",
)
_PARTS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Stacked:
    """Where a parameter is stored: the tensor's name, and its layer's index on the first axis."""

    key: str
    layer: int | None


def stored_as(name: str, *, stacked: bool = True) -> Stacked:
    """Where a parameter is stored; with ``stacked=False`` layers keep their numbers."""
    match = LAYER.match(name)
    if match is None:
        return Stacked(name, None)
    if not stacked:
        return Stacked(f"{match['head']}{match['layer']}.{_renamed(match['tail'])}", None)
    return Stacked(f"{match['head']}{_renamed(match['tail'])}", int(match["layer"]))


def parameters_in(shapes: Mapping[str, Shape]) -> dict[str, Stacked]:
    """Where each parameter is stored, from the names and full shapes of stored tensors.

    Raises:
        CheckpointError: if one is stored twice: stacked and numbered, or under two names of a norm.
    """
    found: dict[str, Stacked] = {}

    def add(name: str, place: Stacked) -> None:
        if name in found:
            raise CheckpointError(
                f"{name} is stored twice, in {found[name].key} and in {place.key}: two checkpoints "
                "are mixed. Restore the right one from a copy."
            )
        found[name] = place

    for key, shape in shapes.items():
        stacked, numbered = _STACKED.match(key), LAYER.match(key)
        if numbered is not None:
            tail = _own(numbered["tail"][1:])
            add(f"{numbered['head']}{numbered['layer']}.{tail}", Stacked(key, None))
        elif stacked is not None:
            for layer in range(shape[0]):
                add(f"{stacked['head']}{layer}.{_own(stacked['tail'])}", Stacked(key, layer))
        else:
            add(key, Stacked(key, None))
    return found


def own_name(name: str) -> str:
    """A parameter's name in the module, from its name in a checkpoint with numbered layers."""
    match = LAYER.match(name)
    return name if match is None else f"{match['head']}{match['layer']}.{_own(match['tail'][1:])}"


def in_model_order(names: Iterable[str]) -> list[str]:
    """Sort parameters into the order in which a Megatron-Core model registers them.

    Raises:
        CheckpointError: for an unknown parameter: flat buffers carry no names, so parameters in a
            wrong order would load without an error.
    """
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, int, int, int]:
    match = LAYER.match(name)
    owner, _, part = name.rpartition(".")
    try:
        if match is None:
            (place,) = (n for n, known in enumerate(_ORDER) if owner.endswith(known))
            return place, 0, 0, _PARTS.index(part)
        inner = match["tail"][1:].rpartition(".")[0]
        layers = _ORDER.index("layers")
        return layers, int(match["layer"]), _LAYER_ORDER.index(inner), _PARTS.index(part)
    except ValueError:
        raise CheckpointError(
            f"{name}: not a parameter that is known here, so its place among the others is not. "
            "Resume in Megatron, and save a model of Megatron-Core's GPT or BERT."
        ) from None


def _renamed(tail: str) -> str:
    tail = tail.removeprefix(".")
    for own, stored in _STORED:
        if tail.startswith(own):
            return stored + tail.removeprefix(own)
    return tail


def _own(tail: str) -> str:
    for own, stored in _STORED:
        if tail.startswith(stored):
            return own + tail.removeprefix(stored)
    return tail
