"""The inspection tool on other programs' checkpoints: what it says of sound ones."""

import functools
import json
import pickle
import shutil
import tracemalloc

import pytest
import torch
from foreign_checkpoints import HISTORY, PICO_PARAMETERS, UNVERIFIED, look_at, made_in
from programs import inspect

from lag_megatron.checkpoint.universal.format import Universal

# Torch says so of every save by a single process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

LLAMA_PARAMETERS = 2 * 64 * 16 + 2 * (16 * 16 * 2 + 8 * 16 * 2 + 3 * 16 * 32 + 2 * 16) + 16
GPT2_PARAMETERS = 2 * (12 * 16 * 16 + 13 * 16) + (64 + 8) * 16 + 2 * 16
STATES = ["fp32", "exp_avg", "exp_avg_sq"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return functools.partial(made_in, tmp_path_factory.getbasetemp())


@pytest.fixture
def copied(made, tmp_path):
    return lambda name: shutil.copytree(made(name), tmp_path / made(name).name)


@pytest.fixture
def look(capsys):
    return functools.partial(look_at, capsys=capsys)


TORCH_DIST = {"format": "Megatron-Core torch_dist", "step": 7, "tokens": 80, "committed": True}
EXPECTED = {
    "universal": {"step": 3, "tokens": 96, "parameters": PICO_PARAMETERS, "committed": True},
    "universal3": {"step": 3, "tokens": 96, "parameters": PICO_PARAMETERS, "committed": True},
    "stacked": {**TORCH_DIST, "parameters": PICO_PARAMETERS},
    "numbered": {**TORCH_DIST, "parameters": PICO_PARAMETERS},
    "plain": {"format": "torch DCP 1.0.0", "step": 5, "tokens": None, "parameters": 3 * 20},
    "flat": {"format": "torch DCP 1.0.0", "step": 5, "tokens": None, "parameters": 3 * 20},
    "llama": {"step": None, "tokens": None, "parameters": LLAMA_PARAMETERS, "committed": None},
    "gpt2": {"step": None, "parameters": GPT2_PARAMETERS},
    "pickled": {"parameters": None},
}
WRITTEN = {
    "universal": (STATES, [0.01, 0.01], [10, 18], (1, 2, 1, "fp32")),
    "universal3": (STATES, [0.01, 0.01], [10, 18], (3, 2, 1, "fp32")),
    "stacked": (STATES[1:], [0.25], [None], (None, 1, 2, "fp32")),
    "numbered": (STATES[1:], [0.25], [None], (None, 1, 2, "fp32")),
    "plain": (STATES[1:], [0.5], [None], (None, None, None, "bf16")),
    "flat": (STATES[1:], [0.5], [6], (None, None, None, "bf16")),
    "llama": ([], [], [], (None, None, None, "bf16")),
    "gpt2": ([], [], [], (None, None, None, "fp32")),
    "pickled": ([], [], [], (None, None, None, None)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_says_what_there_is(name, made, look, capsys):
    path = made(name)
    facts = look(path)
    assert {key: facts[key] for key in EXPECTED[name]} == EXPECTED[name]
    states, rates, tensors, topology = WRITTEN[name]
    assert facts["optimizer_states"] == states
    assert [group["lr"] for group in facts["optimizer"]] == rates
    assert [group["tensors"] for group in facts["optimizer"]] == tensors
    keys = ("zero_stage", "data_parallel", "tensor_parallel", "precision")
    assert tuple(facts["topology"][key] for key in keys) == topology
    assert facts["layers"] == (3 if name in ("plain", "flat") else 2)
    assert facts["growth_history"] == ([HISTORY] if name.startswith("universal") else [])
    assert (facts["path"], facts["sound"], facts["complete"]) == (str(path), True, True)
    on_disk = {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    assert facts["files"] == on_disk
    assert facts["bytes"] == sum(on_disk.values())
    assert inspect(path) == 0
    assert facts["format"] in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPECTED)
def test_verify_finds_no_damage_but_calls_it_unverified(name, made, look):
    assert look(made(name), "--verify")["problems"] == [UNVERIFIED]


def test_formats_by_name(made, look):
    assert look(made("universal"))["format"].endswith(", universal")
    assert look(made("llama"))["format"] == "Hugging Face transformers, LlamaForCausalLM"
    assert look(made("gpt2"))["format"] == "Hugging Face transformers, GPT2LMHeadModel"


def test_progress_that_a_trainer_recorded(copied, look):
    from transformers import TrainerState

    path = copied("gpt2")
    state = TrainerState(global_step=40, num_input_tokens_seen=1234)
    state.save_to_json(str(path / "trainer_state.json"))
    assert (look(path)["step"], look(path)["tokens"]) == (40, 1234)


def test_pointers_are_followed(made, tmp_path, look, capsys):
    universal = made("universal")
    assert look(universal.parent)["path"] == str(universal)
    shutil.copytree(made("stacked"), tmp_path / "iter_0000007")
    pointer = tmp_path / "latest_checkpointed_iteration.txt"
    pointer.write_text("7")
    assert look(tmp_path)["step"] == 7
    pointer.write_text("8")
    assert inspect(tmp_path) == 2
    assert "names '8', but there is no" in capsys.readouterr().err


def test_metadata_with_cached_plans_is_read(copied, look):
    """What Megatron-Core leaves in it where it keeps the plan of a save for the next one."""
    from torch.distributed.checkpoint import metadata as meta
    from torch.distributed.checkpoint import planner

    path = copied("stacked")
    found = pickle.loads((path / ".metadata").read_bytes())
    chunk = meta.ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    data = planner.TensorWriteData(chunk, meta.TensorProperties(torch.int8), torch.Size([3]))
    kind = planner.WriteItemType.SHARD
    item = planner.WriteItem(meta.MetadataIndex("x", [0]), kind, tensor_data=data)
    found.all_local_plans = [planner.SavePlan([item])]
    (path / ".metadata").write_bytes(pickle.dumps(found))
    assert look(path)["parameters"] == PICO_PARAMETERS


def test_tensors_stay_on_disk(tmp_path, look):
    size = 1 << 33
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"layers.0.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "config.json").write_text('{"model_type": "x", "num_hidden_layers": 1}')
    tracemalloc.start()
    try:
        assert look(tmp_path)["parameters"] == size // 4
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_states_are_the_converted_values(made):
    for name in ("universal", "universal3"):
        checkpoint = Universal.open(made(name))
        weight = checkpoint.state("decoder.final_layernorm.weight", "fp32")
        assert weight.shape == (16,)
        assert 0 < (weight - 1).abs().max() < 0.1  # three steps of 0.01 away from one


@pytest.mark.parametrize("content", [{}, {"metadata.json": "{}"}, {"config.json": "{}"}])
def test_other_directories_are_a_users_error(content, tmp_path, capsys):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert inspect(tmp_path) == 2
    assert capsys.readouterr().err == f"{tmp_path}: holds no checkpoint. Give a tag directory.\n"
