"""``grow_engine`` from checkpoints of other formats: the same state as from a ZeRO checkpoint."""

from functools import partial

import pytest
import torch
from conftest import run_ranks
from full_state import tree_differences
from plain_program import At, masters
from safetensors.torch import load_file, save_file
from transformers_engines import bert, build, llama, save

import lag_megatron as lag
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.plan import GrowthPlan

AT = At(1, 2)
PLAN = GrowthPlan(
    operator="lag",
    options={"index": 1, "block_size": 1, "init": "duplicate"},
    source_layers=2,
    target_layers=3,
)


def grown_from(make_model, checkpoints):
    """On each rank: weights, masters, moments and step counts of an engine, by checkpoint."""
    engine = build(AT, 3, make_model=make_model, torch_adam=True)
    found = []
    for checkpoint in checkpoints:
        lag.grow_engine(engine, checkpoint, PLAN)
        moments = engine.optimizer.optimizer.state.values()
        state = [{k: torch.as_tensor(v).clone() for k, v in kept.items()} for kept in moments]
        weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        copied = [master.detach().clone() for master in masters(engine.optimizer)]
        found.append((weights, copied, state, engine.global_steps))
    engine.destroy()
    return found


def grown_by_hand(model):
    """Parameters of a model of two layers, the second of which is there twice."""
    old = dict(model.named_parameters())
    copies = {
        name.replace("layers.1.", "layers.2.").replace("layer.1.", "layer.2."): value
        for name, value in old.items()
    }
    return {name: value.detach() for name, value in (copies | old).items()}


@pytest.mark.parametrize("make_model", [llama, bert])
def test_a_universal_checkpoint_and_a_directory_of_transformers(make_model, tmp_path):
    start = partial(build, make_model=make_model, torch_adam=True)
    run_ranks(save, 2, AT, tmp_path, start)
    lag.convert(tmp_path / "source", tmp_path / "universal", to="universal")
    model = make_model(2)
    model.save_pretrained(tmp_path / "hf")
    ways = [tmp_path / way for way in ("source", "universal", "hf")]
    for trained, universal, (weights, _, moments, steps) in run_ranks(
        grown_from, 2, make_model, ways
    ):
        assert tree_differences(trained, universal) == []
        assert tree_differences(weights, grown_by_hand(model)) == []
        assert steps == 0
        assert not any(value.any() for state in moments for value in state.values())


def refuses(make_model, folder, text):
    engine = build(AT, 3, make_model=make_model, torch_adam=True)
    with pytest.raises(CheckpointError, match=text):
        lag.grow_engine(engine, folder, PLAN)
    engine.destroy()
    return True


def test_tensors_that_the_model_has_not_and_untied_heads_are_refused(tmp_path):
    torch.manual_seed(2)
    llama(2).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for surplus, text in (
        ("model.layers.0.self_attn.q_norm.weight", r"q_norm\.weight \(1 such\) is not in the eng"),
        ("lm_head.weight", r"lm_head\.weight differs from model\.embed_tokens\.weight"),
    ):
        shape = tensors["model.embed_tokens.weight"].shape
        save_file(tensors | {surplus: torch.ones(shape)}, file, {"format": "pt"})
        assert run_ranks(refuses, 2, llama, tmp_path, text) == [True, True]
