"""Comparing a converted checkpoint with its source, tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path

import torch

from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.checkpoint.state.box import numel
from lag_megatron.checkpoint.state.layout import STATES, State
from lag_megatron.checkpoint.state.optimizer_states import state_shape, states_of
from lag_megatron.checkpoint.state.source import UNSHARDED
from lag_megatron.checkpoint.state.spec import DTYPES
from lag_megatron.checkpoint.state.unsharded import UnshardedState
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.growth.apply.conversion import Conversion, unsharded_state
from lag_megatron.growth.apply.grown_state import resharded

_PIECE = 1 << 20  # elements
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


def differences(conversion: Conversion, target: Path) -> Iterator[str]:
    """Yield corrupted files of the target, then tensors whose masters or moments differ.

    Of ``hf`` only the weights are compared, in its precision and without vocabulary padding.

    Args:
        conversion: that wrote the target.
        target: the directory.
    """
    yield from manifest.find_corrupted_files(target)
    source, is_hf = conversion.unsharded, conversion.to == "hf"
    rows = next((s[0] for n, s in source.shapes.items() if n in _VOCABULARY), None)
    found = unsharded_state(
        resharded(
            open_checkpoint(target, vocab_size=rows if is_hf else None),
            UNSHARDED,
            allow_nonfinite=conversion.allow_nonfinite,
        )
    )
    yield from _names(source, found)
    dtype = DTYPES[conversion.dtype] if is_hf else torch.float32
    for name in (name for name in source.shapes if name in found.shapes):
        shape = source.shapes[name]
        kept = conversion.export.vocab_size if is_hf and name in _VOCABULARY else shape[0]
        states = states_of(source.spec.layout.optimizer, shape)
        for state in states if source.is_trained(name) and not is_hf else STATES[:1]:
            like = state_shape(state, shape)
            end = kept * numel(shape[1:]) if like == shape else numel(like)
            count = _unlike(source, found, name, state, end, dtype)
            if count:
                yield f"{name}: {state}: {count} of {numel(shape)} elements differ"


def _names(source: UnshardedState, found: UnshardedState) -> Iterator[str]:
    for name, shape in source.shapes.items():
        if name not in found.shapes:
            yield f"{name}: missing"
        elif found.shapes[name] != shape:
            yield f"{name}: of shape {found.shapes[name]}, expected {shape}"
    yield from (f"{name}: not of the source" for name in found.shapes if name not in source.shapes)


def _unlike(
    source: UnshardedState,
    found: UnshardedState,
    name: str,
    state: State,
    end: int,
    dtype: torch.dtype,
) -> int:
    """How many of a tensor's first ``end`` elements are not equal bit for bit."""
    count = 0
    for start in range(0, end, _PIECE):
        length = min(_PIECE, end - start)
        here = source.read(name, state, start, length).to(dtype)
        there = found.read(name, state, start, length).to(dtype)
        width = torch.int32 if dtype == torch.float32 else torch.int16
        count += int((here.view(width) != there.view(width)).sum())
    return count
