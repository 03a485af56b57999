"""Conversions between formats, with growth on the way and without: what arrives."""

import dataclasses
import json

import pytest
import tokenizers
import torch
import transformers
from conftest import PICO_VOCABULARY, pico_config, run_ranks, train_and_save
from converting import EXACT, FAMILIES, convert, load_weights, save_families
from hf_weights import HEADS, LAYERS
from programs import grow, inspect
from tokenizers import models, pre_tokenizers

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.config import OptimizerConfig

families = pytest.fixture(save_families, scope="module")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_every_format(family, families, tmp_path, capsys):
    model, source = families[family]
    step, tags = tmp_path, []
    ways = [
        ("zero", "--world-size", 3),
        ("universal",),
        ("zero", "--world-size", 2, "--tensor-parallel", 2, "--zero-stage", 3),
        ("megatron",),
        ("hf", "--max-shard-size", "20KB"),
    ]
    here = source
    for number, (form, *options) in enumerate(ways):
        step = tmp_path / str(number)
        assert convert(here, step, "--to", form, *options, "--verify") == 0, capsys.readouterr()
        assert "verified: every " in capsys.readouterr().out
        assert inspect(step, "--verify") == 0
        tags.append(sorted(p.name for p in step.iterdir() if p.suffix != ".json")[0])
        here = step
    assert tags[:4] == ["latest", "latest_universal", "latest", "iter_0000000"]
    capsys.readouterr()
    back = type(model).from_pretrained(here)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(back.config, key) == getattr(model.config, key)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert load_weights(here).keys() == load_weights(source).keys()


def test_an_import_is_moved_and_grown_like_any_other(families, tmp_path):
    """It has no settings of DeepSpeed's: what these say is left out once more."""
    zero = tmp_path / "zero"
    assert convert(families["gpt2"][1], zero, "--to", "zero", *EXACT) == 0
    moved = ("--to", "zero", "--world-size", 2, "--verify")
    assert convert(zero, tmp_path / "moved", *moved) == 0
    assert grow(zero, tmp_path / "grown", "--operator", "last", "--layers", LAYERS + 1) == 0
    assert convert(tmp_path / "moved", tmp_path / "hf", "--to", "hf") == 0
    ours, theirs = load_weights(tmp_path / "hf"), load_weights(families["gpt2"][1])
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "out", "--to", "hf", "--dry-run") == 0
    assert f"{checkpoint} -> {tmp_path / 'out'}\nto write: 0.0 MiB" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_bert_grows_on_the_way_and_fills_masks(tmp_path):
    """12 to 16 layers from a directory of transformers to another, for a pipeline."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    backend = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.add_special_tokens(words[:5])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 12, "max_position_embeddings": 16, "vocab_size": len(words)}
    config = transformers.BertConfig(**shape)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "bert12")
    options = ("index=6", "block_size=4", "init=duplicate")
    growth = ("--operator", "lag", *(x for o in options for x in ("--set", o)), "--layers", 16)
    out = tmp_path / "bert16"
    source = tmp_path / "bert12"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(source)
    assert convert(source, out, "--to", "hf", *growth, "--verify") == 0
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    grown = transformers.BertForMaskedLM.from_pretrained(out)
    assert grown.config.num_hidden_layers == 16
    assert grown.config.vocab_size == len(words)
    old, new = (m.bert.encoder.layer for m in (model, grown))
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    assert (plan["source_layers"], plan["target_layers"]) == (12, 16)
    for number, layer in enumerate(new):
        twin = old[number if number < 10 else number - 4]  # layers 6 to 9 stand twice
        for name, value in layer.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), (number, name)
    fill = transformers.pipeline("fill-mask", model=str(out), device="cpu")
    (best, *_) = fill("w7 w9 [MASK] w11")
    assert best["token_str"] in words


def test_what_megatrons_own_optimizer_asks_of_the_settings(checkpoint, tmp_path):
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    assert convert(checkpoint, tmp_path / "m", "--to", "megatron") == 0
    common = torch.load(tmp_path / "m" / "iter_0000003" / "common.pt", weights_only=False)
    groups = common["optimizer"]["optimizer"]["param_groups"]
    assert [group["wd_mult"] for group in groups] == [1.0, 0.0]
    assert all(set(param_group_identifier_keys) <= set(group) for group in groups)
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=1, lr_decay_steps=100,
        lr_decay_style="linear", start_wd=0.1, end_wd=0.1, wd_incr_steps=1,
        wd_incr_style="constant", override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    scheduler.load_state_dict(common["opt_param_scheduler"])
    assert scheduler.num_steps == 12  # three steps of four sequences


def test_adafactors_means_are_verified(tmp_path):
    config = pico_config(zero_stage=0)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(name="adafactor"))
    run_ranks(train_and_save, 1, config, tmp_path)
    ways = ("--to", "zero", "--zero-stage", 0, "--verify")
    assert convert(tmp_path / "step3", tmp_path / "out", *ways) == 0


@pytest.mark.parametrize("head", [True, False])
def test_the_order_of_parameters_is_megatrons(head):
    from lag_megatron.checkpoint.megatron.param_names import in_model_order

    bert = {"family": "bert", "token_types": 2, "sentence_head": head}
    for shape in ({}, {"llama": True}, bert, bert | {"norm_position": "post"}):
        (names,) = run_ranks(names_of, 1, pico_config(**shape))
        assert in_model_order(sorted(names)) == names


def names_of(config):
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    start_world(tensor=1)
    model = build_model(config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY)
    names = [name for name, _ in model.named_parameters()]
    stop_world()
    return names


def test_the_grown_and_the_converted_agree(checkpoint, tmp_path):
    """Growing shards and then converting is converting with growth on the way."""
    growth = ("--operator", "last", "--layers", 3)
    assert grow(checkpoint, tmp_path / "grown", *growth) == 0
    assert convert(tmp_path / "grown", tmp_path / "a", "--to", "universal") == 0
    assert convert(checkpoint, tmp_path / "b", "--to", "universal", *growth) == 0
    files = [
        manifest.read_manifest(tmp_path / name / "step3_universal")["files"] for name in ("a", "b")
    ]
    values = [{k: v for k, v in listed.items() if k.startswith("zero/")} for listed in files]
    assert values[0] == values[1]
    assert (
        ZeroCheckpoint.open(checkpoint).layout.shapes["embedding.word_embeddings.weight"][0]
        == PICO_VOCABULARY
    )
    assert HEADS == 4
