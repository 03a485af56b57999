"""Models of transformers that DeepSpeed trained, converted to Megatron's checkpoints and back.

The expected tensors are made by the tests' own reader of shards and a map of names that is written
down by hand; Megatron-Core's own loader reads the result.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import pico_config, run_ranks, sparing
from converting import convert, load_weights, refused
from full_state import read_full
from hf_weights import FFN, LENGTH, LLAMA_GROUPS, VOCABULARY, hf_model, megatron_weights
from megatron_loader import load_dist
from plain_program import At
from plain_program import train_and_save as train_and_save_plain

STATES = ("fp32", "exp_avg", "exp_avg_sq")
TAG = "global_step2"
BERT = {"family": "bert", "norm_position": "post", "activation": "gelu_exact", "token_types": 2}
MODELS = {"gpt2": {}, "llama": {"llama": True, "num_query_groups": LLAMA_GROUPS}, "bert": BERT}


def train(kinds, folder):
    """On each rank: two steps of each model under ZeRO-1, as a program of transformers takes."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    for kind in kinds:
        model = hf_model(kind).train()
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=At(1, 2).config()
        )
        for step in range(2):
            seed = torch.Generator().manual_seed(10 * step + engine.global_rank)
            tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=seed)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        engine.save_checkpoint(str(folder / kind), TAG)
        if engine.global_rank == 0:  # as transformers' Trainer does
            model.config.save_pretrained(folder / kind)
        engine.destroy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(train, 2, list(MODELS), folder)
    return folder


def under_transformers_names(folder):
    """{state: {name: whole tensor}}."""
    found, _ = read_full(folder / TAG, stage=1, data_size=2, tensor_size=1, precision="fp32")
    return {s: {name: v for (state, name), v in found.items() if state == s} for s in STATES}


def expected_of(kind, folder):
    """{(state, Megatron's name): whole tensor}."""
    found = {}
    for state, tensors in under_transformers_names(folder).items():
        model = SimpleNamespace(named_parameters=tensors.items)
        for name, value in megatron_weights(kind, model).items():
            found[state, name] = value
    return found


@pytest.mark.parametrize("kind", sparing(MODELS, slow=lambda kind: kind != "llama"))
def test_megatron_loads_what_deepspeed_trained(kind, trained, tmp_path, capsys):
    given = ("--to", "megatron", "--vocab-size", VOCABULARY, "--verify")
    assert convert(trained / kind, tmp_path, *given) == 0
    printed = capsys.readouterr().out
    assert "verified: every master and every moment" in printed
    assert ("lag_megatron's post-LN BERT" in printed) == (kind == "bert")
    assert ("with Megatron-Core's parameter names" in printed) == (kind != "bert")
    shape = {"ffn_hidden_size": FFN, "seq_length": LENGTH, "vocab_size": VOCABULARY}
    config = pico_config(**shape, **MODELS[kind])
    args = (config, tmp_path / "iter_0000002", False, VOCABULARY)
    ((found, iteration, _),) = run_ranks(load_dist, 1, *args)
    assert iteration == 2
    expected = expected_of(kind, trained / kind)
    assert {key for key in found if key[0] != "weight"} == expected.keys()
    for (state, name), value in expected.items():
        assert torch.equal(found[state, name], value), (state, name)
        assert value.abs().max() > 0, (state, name)
        if state == "fp32":
            assert torch.equal(found["weight", name], value), name


@pytest.mark.parametrize("kind", sparing(MODELS, slow=lambda kind: kind != "gpt2"))
def test_transformers_gets_the_trained_weights(kind, trained, tmp_path):
    assert convert(trained / kind, tmp_path / "hf", "--to", "hf", "--verify") == 0
    masters = under_transformers_names(trained / kind)["fp32"]
    found = load_weights(tmp_path / "hf")
    assert found.keys() == masters.keys()
    for name, value in masters.items():
        assert torch.equal(found[name], value), name


def test_padding_and_growth_on_the_way(trained, tmp_path):
    grown = ("--operator", "last", "--layers", 3)
    assert convert(trained / "llama", tmp_path, "--to", "megatron", *grown, "--verify") == 0
    shape = {"ffn_hidden_size": FFN, "seq_length": LENGTH, "num_layers": 3}
    config = pico_config(**shape, vocab_size=128, **MODELS["llama"])
    ((found, *_),) = run_ranks(load_dist, 1, config, tmp_path / "iter_0000002", False, 128)
    expected = expected_of("llama", trained / "llama")
    for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
        old = expected["fp32", f"decoder.layers.1.{name}"]
        assert torch.equal(found["fp32", f"decoder.layers.2.{name}"], old)
    words = expected["fp32", "embedding.word_embeddings.weight"]
    padded = found["fp32", "embedding.word_embeddings.weight"]
    assert torch.equal(padded[:VOCABULARY], words)
    assert torch.equal(padded[VOCABULARY:], words[-1:].expand(128 - VOCABULARY, -1))


def test_without_the_number_of_heads(trained, tmp_path, capsys):
    source = shutil.copytree(trained / "llama", tmp_path / "llama")
    (source / "config.json").unlink()
    message = refused(capsys, 2, source, tmp_path / "out", "--to", "megatron")
    assert f"{source / 'config.json'}, which would say the number of heads, is not there" in message
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", "--to", "universal") == 0
    assert "with the source's parameter names" in capsys.readouterr().out


def test_models_without_a_map(tmp_path, capsys):
    run_ranks(train_and_save_plain, 2, [(At(1, 2), tmp_path)])
    for form in ("megatron", "hf"):
        message = refused(capsys, 2, tmp_path / "source", tmp_path / "out", "--to", form)
        assert "is no parameter of Megatron-Core's GPT or BERT" in message
    assert not (tmp_path / "out").exists()
