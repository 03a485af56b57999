"""Checkpoints of other programs, made by those programs' own savers."""

import argparse
import functools
import json
import shutil

import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import PICO_VOCABULARY, pico_config, run_ranks, train_and_save
from programs import inspect

UNVERIFIED = "unverified: there is no manifest to compare with, so damage cannot be ruled out"
NORM = "zero/decoder.final_layernorm.weight"
PICO_PARAMETERS = 2 * (4 * 16 * 16 + 2 * 16 * 32 + (4 + 3 + 1 + 1) * 16 + 32) + (64 + 8) * 16 + 32
HISTORY = {"operator": "lag", "options": {"index": 1}, "source_layers": 1, "target_layers": 2}


def universal(folder, zero_stage):
    """A checkpoint of our trainer, converted by DeepSpeed's own program."""
    from deepspeed.checkpoint.ds_to_universal import main

    config = pico_config(zero_stage=zero_stage)
    run_ranks(_save_grown, 2, config, folder)
    for file in (folder / "step3").glob("*_model_states.pt"):
        states = torch.load(file, weights_only=False)
        # What the converter asks of Megatron's models: no empty entries, and its information.
        states["module"] = {k: v for k, v in states["module"].items() if v is not None}
        torch.save(states | {"universal_checkpoint_info": {}}, file)
    main(
        argparse.Namespace(
            input_folder=str(folder / "step3"),
            output_folder=str(folder / "step3_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    shutil.rmtree(folder / "step3")
    (folder / "latest").unlink()
    return folder / "step3_universal"


def _save_grown(config, folder):
    train_and_save(config, folder, client_state={"growth_history": [HISTORY]})


def _save_megatron(folder, metadata, arguments):
    """Megatron-Core's save on two tensor-parallel ranks.

    Its own strategy for the shards calls CUDA and starts processes, so torch's writer takes their
    place; the translation, the planner and all other files are Megatron's.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import optimizer as shards
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    class OnCpu(SaveShardedStrategy):
        can_handle_sharded_objects = True

        def save(self, sharded_state_dict, checkpoint_dir):
            found = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            torch_dcp.save(
                strategies.mcore_to_pyt_state_dict(found[0], False),
                storage_writer=torch_dcp.FileSystemWriter(checkpoint_dir),
                planner=strategies.MCoreSavePlanner(
                    dedup_replicated_tensors=False, flatten_state_dict=False
                ),
            )

    start_world(tensor=2)
    config = pico_config(tensor=2)
    gpt = build_model(config.model, config.parallel, num_layers=2, vocab_size=PICO_VOCABULARY)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.25)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter)  # memory that is not set may hold NaN
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model, state = gpt.sharded_state_dict(metadata=metadata), optimizer.state_dict()
    ids = shards.get_param_id_to_sharded_param_map(model, gpt.parameters())
    shards.optim_state_to_sharding_state(state, ids, exclude_keys=("step",))
    content = {"model": model, "optimizer": state, "iteration": 7, "args": arguments}
    dist_checkpointing.save(content, str(folder), OnCpu("torch_dist", 1))
    stop_world()


def torch_dist(folder, metadata):
    """Layers stacked under one name each, or numbered; with what training programs put beside."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    arguments = argparse.Namespace(
        num_layers=2,
        data_parallel_size=1,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        consumed_train_samples=10,
        seq_length=8,
        params_dtype=torch.float32,
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.auto,
    )
    run_ranks(_save_megatron, 2, folder, metadata, arguments)
    return folder


def plain(folder, *, flat):
    """Weights, AdamW's state and a counter, as torch's own Distributed Checkpoint.

    ``flat`` is how FSDP and torchtitan save: every parameter has its hyper-parameters.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(3))
    model = torch.nn.ModuleDict({"layers": layers})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    content = {"model": weights, "optim": state, "step": 5}
    torch_dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads))


def llama(folder):
    """Several shards, in bf16, output weights of their own."""
    _llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="5KB")
    return folder


def gpt2(folder):
    """One file; the output weights are the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def pickled(folder):
    """What older versions of transformers saved; the installed one does so no more."""
    model = _llama()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


MAKERS = {
    "universal": lambda folder: universal(folder, 1),
    "universal3": lambda folder: universal(folder, 3),
    "stacked": lambda folder: torch_dist(folder, {}),
    "numbered": lambda folder: torch_dist(folder, {"non_homogeneous_layers": True}),
    "plain": lambda folder: plain(folder, flat=False),
    "flat": lambda folder: plain(folder, flat=True),
    "llama": llama,
    "gpt2": gpt2,
    "pickled": pickled,
}


@functools.cache
def made_in(folder, name):
    """A checkpoint in a session's folder, made once; it is never to be changed."""
    (folder / f"foreign-{name}").mkdir()
    return MAKERS[name](folder / f"foreign-{name}")


def look_at(path, *options, capsys):
    """What the inspection tool prints as JSON, after a look at its exit code and messages."""
    capsys.readouterr()
    code = inspect(path, "--json", *options)
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert printed.err.splitlines() == facts["problems"]
    assert code == (1 if facts["problems"] else 0)
    return facts
