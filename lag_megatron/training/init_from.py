"""Starting a run from the weights of a checkpoint, of any format that can be read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.checkpoint.state.source import CheckpointSource
from lag_megatron.checkpoint.storage.integrity import VerifyScope
from lag_megatron.config import ModelConfig
from lag_megatron.engine.engine import Engine
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.apply.grown_state import resharded

# Settings that change what a model computes but not the shapes of its parameters.
_SETTINGS = ("family", "num_attention_heads", "num_query_groups", "positions", "rotary_base",
             "norm", "norm_eps", "norm_position", "activation", "tied_embeddings")  # fmt: skip


def start_from(engine: Engine, path: Path, *, vocab_size: int) -> str:
    """Load the weights of a checkpoint into an engine; optimizer, steps and data start from zero.

    Each rank reads its own shards only.

    Args:
        engine: every rank calls with its own.
        path: a checkpoint of DeepSpeed, Megatron-Core or transformers.
        vocab_size: rows of the vocabulary, to which those of transformers are padded.

    Returns:
        a note for the log.

    Raises:
        CheckpointError: if it is damaged, or of another model; the differences are named.
    """
    opened: list[CheckpointSource] = []  # each rank opens its own
    engine.world.run_on_all_ranks(lambda: opened.append(_opened(engine, path, vocab_size)))
    (source,) = opened
    world = engine.world
    look = VerifyScope(world.rank, world.size, states=("fp32",))
    world.run_on_all_ranks(lambda: source.require_sound(look))
    growth = resharded(source, engine.topology)
    state = engine.state
    engine.world.run_on_all_ranks(lambda: state.require_compatible(growth, weights_only=True))
    engine.world.run_on_all_ranks(lambda: state.overwrite_weights(growth))
    state.sync_weights()
    if "model" not in source.client_state:
        return "it does not say what model it is, so names and shapes alone were compared"
    return "the optimizer and the text begin anew"


def growth_history(path: Path) -> list[Any]:
    """The growth plans that led to a checkpoint's model, oldest first."""
    return list(open_checkpoint(path, weights_only=True).client_state.get("growth_history", []))


def _opened(engine: Engine, path: Path, vocab_size: int) -> CheckpointSource:
    source = open_checkpoint(path, vocab_size=vocab_size, weights_only=True)
    source.check_every_file()
    described = source.client_state.get("model")
    found = list(_differences(engine.config.model, described)) if described else []
    if found:
        raise CheckpointError(
            f"{path}: another model than the configuration: {'; '.join(found)}. Change the "
            "configuration, or name another checkpoint.initial."
        )
    return source


def _differences(model: ModelConfig, described: dict[str, Any]) -> Iterator[str]:
    for key in _SETTINGS:
        ours = getattr(model, key)
        if key in described and described[key] != ours:
            yield f"model.{key} is {ours}, there {described[key]}"
