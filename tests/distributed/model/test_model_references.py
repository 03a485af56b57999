"""Models of each family against transformers', and BERT's heads against Megatron's own."""

import contextlib
import dataclasses

import hf_weights as hf
import pytest
import torch
from conftest import run_ranks

from lag_megatron.config import ModelConfig, ParallelConfig

KINDS = ("bert", "gpt2", "llama")
TOLERANCE = 1e-5  # of logits of about 5, in fp32


def model_config(kind, **changes):
    shape = {
        "num_layers": hf.LAYERS,
        "hidden_size": hf.HIDDEN,
        "ffn_hidden_size": hf.FFN,
        "num_attention_heads": hf.HEADS,
        "num_query_groups": hf.HEADS,
        "seq_length": hf.LENGTH,
    }
    if kind == "bert":
        shape |= {"family": "bert", "norm_position": "post", "activation": "gelu_exact"}
        shape |= {"token_types": 2}
    if kind == "llama":
        shape |= {"num_query_groups": hf.LLAMA_GROUPS, "positions": "rope", "norm": "rmsnorm"}
        shape |= {"activation": "swiglu", "bias": False, "tied_embeddings": False}
    return ModelConfig(**(shape | changes))


def build(config, parallel, world):
    """A model of which every parameter, vectors included, is far from what it starts as."""
    from lag_megatron.config import RunConfig, StageConfig
    from lag_megatron.model import build_model
    from lag_megatron.model.initialize import initialize_weights
    from lag_megatron.model.random_state import seed_everywhere

    seed_everywhere(1)
    model = build_model(config, parallel, num_layers=config.num_layers, vocab_size=hf.VOCABULARY)
    run = RunConfig(model=config, stages=(StageConfig(steps=1),), parallel=parallel)
    with_init = dataclasses.replace(run, model=dataclasses.replace(config, init_std=0.2))
    initialize_weights(
        model,
        with_init,
        world,
        num_layers=config.num_layers,
        gathered=lambda _: contextlib.nullcontext(),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                places = torch.arange(len(parameter), dtype=torch.float32)
                parameter.add_(0.2 * torch.sin(1 + places))
    return model


def inputs(rows=3):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, hf.VOCABULARY, (rows, hf.LENGTH), generator=generator)
    is_token = torch.arange(hf.LENGTH) < torch.tensor([[hf.LENGTH], [7], [1]])[:rows]
    types = torch.randint(0, 2, (rows, hf.LENGTH), generator=generator)
    return tokens, torch.arange(hf.LENGTH).expand(rows, -1), types, is_token


def logits_of(kind, weights, parallel):
    """On each rank: all logits of our model with these weights."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model

    world = start_world(tensor=parallel.tensor)
    model = build_model(
        model_config(kind), parallel, num_layers=hf.LAYERS, vocab_size=hf.VOCABULARY
    ).eval()
    hf.load_part(
        model, weights, rank=world.tensor_rank, size=world.tensor_size, gated=kind == "llama"
    )
    tokens, places, types, is_token = inputs()
    if kind == "bert":
        logits, _ = model(tokens, places, types, is_token)
    else:
        logits = model(tokens, places, None)
    found = gather_from_tensor_model_parallel_region(logits).detach()
    stop_world()
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tensor):
    theirs = hf.hf_model(kind)
    tokens, _, types, is_token = inputs()
    options = {"attention_mask": is_token, "token_type_ids": types} if kind == "bert" else {}
    with torch.no_grad():
        expected = theirs(tokens, **options).logits
    weights = hf.megatron_weights(kind, theirs)
    shown = is_token if kind == "bert" else torch.ones_like(is_token)
    for found in run_ranks(logits_of, tensor, kind, weights, ParallelConfig(tensor=tensor)):
        assert expected.abs().max() > 1
        assert (found - expected)[shown].abs().max() < TOLERANCE


def bert_batch(rows=3, width=4):
    """Predictions at some real positions; unused places have position 0 and count for nothing."""
    tokens, places, types, is_token = inputs(rows)
    counts = torch.tensor([4, 3, 1])[:rows, None]
    order = torch.rand(rows, hf.LENGTH, generator=torch.Generator().manual_seed(9))
    positions = order.masked_fill(~is_token, 2).argsort(dim=1)[:, :width]
    used = torch.arange(width) < counts
    labels = torch.randint(0, hf.VOCABULARY, (rows, width))
    return {
        "tokens": tokens,
        "position_ids": places,
        "token_types": types,
        "padding_mask": is_token,
        "masked_positions": positions * used,
        "labels": labels * used,
        "loss_mask": used.float(),
        "sentence_labels": torch.tensor([0, 1, 1])[:rows],
    }


def all_token_sums(model, batch):
    """The loss parts by Megatron's own forward pass, whose head computes every position."""
    from megatron.core.models.bert.bert_model import BertModel

    shape = batch["tokens"].shape
    labels, loss_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for row, used in enumerate(batch["loss_mask"].bool()):
        there = batch["masked_positions"][row, used]
        labels[row, there] = batch["labels"][row, used]
        loss_mask[row, there] = 1.0
    types = batch["token_types"] if model.embedding.num_tokentypes else None
    losses, sentence = BertModel.forward(
        model, batch["tokens"], batch["padding_mask"].float(), types, labels
    )
    parts = [(losses * loss_mask).sum()]
    if sentence is not None:
        chosen = sentence.log_softmax(-1).gather(1, batch["sentence_labels"][:, None])
        parts.append(-chosen.sum())
    return torch.stack(parts)


def bert_gradients(config, parallel):
    """On each rank: losses and gradients, by Megatron's head without options and by ours."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import loss_sums

    world = start_world(tensor=parallel.tensor)
    torch.manual_seed(0)
    batch = bert_batch()
    results = []
    for options, sums_of in (
        (ParallelConfig(tensor=parallel.tensor), all_token_sums),
        (parallel, loss_sums),
    ):
        model = build(config, options, world)
        sums = sums_of(model, batch)
        (sums * torch.tensor([1.0, 0.5])[: len(sums)]).sum().backward()
        results.append((sums.tolist(), {n: p.grad for n, p in model.named_parameters()}))
    stop_world()
    return results


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {"norm_position": "pre"}),
        ({}, {"norm_position": "post", "sentence_head": True}),
        ({"recompute": "layers"}, {"norm_position": "post", "sentence_head": True}),
        ({"tensor": 2}, {"norm_position": "post", "tied_embeddings": False, "token_types": 0}),
        ({"tensor": 2, "sequence_parallel": True}, {"norm_position": "pre"}),
        (
            {"tensor": 2, "sequence_parallel": True, "recompute": "layers"},
            {"norm_position": "post", "sentence_head": True},
        ),
    ],
    ids=str,
)
def test_heads_on_predicted_positions_give_megatrons_gradients(options, shape):
    config, parallel = model_config("bert", **shape), ParallelConfig(**options)
    for (sums, gradients), (our_sums, ours) in run_ranks(
        bert_gradients, parallel.tensor, config, parallel
    ):
        assert len(sums) == 1 + config.sentence_head
        assert our_sums == pytest.approx(sums, rel=1e-5)
        assert set(ours) == set(gradients)
        for name, expected in gradients.items():
            assert expected.abs().max() > 0, name
            error = (ours[name] - expected).norm() / expected.norm()
            assert error < 1e-4, (name, float(error))


def counts_of(config, parallel):
    """On each rank: parameters, and operations of one forward pass as torch counts them."""
    from families import PREDICTIONS, family_batches
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model, loss_sums

    world = start_world(tensor=parallel.tensor)
    layers = config.model.num_layers
    model = build_model(config.model, parallel, num_layers=layers, vocab_size=hf.VOCABULARY)
    batch = family_batches(config, world, 0)[0]
    batch.pop("prefix_length", None)
    assert batch["labels"].shape[1] == PREDICTIONS or config.model.family == "gpt"
    batch["loss_mask"].fill_(1.0)  # rows without weight are not computed
    # With gradients, the head's share of the backward pass would be counted, too.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        loss_sums(model, batch)
    stop_world()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ["bert-post", "bert-pre", "gpt2", "llama"])
def test_parameters_and_operations_are_counted_right(family, tensor):
    from families import PREDICTIONS, family_config

    from lag_megatron.planning.cost import parameter_count, validation_flops_per_token

    config = family_config(family)
    length, shape = config.model.seq_length, {"num_layers": 2, "vocab_size": hf.VOCABULARY}
    share = dataclasses.replace(config.data.mlm, probability=PREDICTIONS / length)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mlm=share))
    expected = parameter_count(config.model, **shape, tensor=tensor)
    flops = validation_flops_per_token(config, **shape) * length
    if config.model.family == "gpt":  # torch counts scores that are hidden, too
        flops += 2 * 2 * length**2 * config.model.hidden_size
    for parameters, counted in run_ranks(counts_of, tensor, config, ParallelConfig(tensor=tensor)):
        assert parameters == expected
        if tensor == 1:
            assert counted == pytest.approx(flops, abs=length)
