"""Small models of every family and batches for them: ``from families import FAMILIES, ...``."""

import dataclasses

import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches

BERT = {"family": "bert", "activation": "gelu_exact", "token_types": 2, "sentence_head": True}
FAMILIES = {
    "bert-post": {**BERT, "norm_position": "post"},
    "bert-pre": {**BERT, "tied_embeddings": False},
    "gpt2": {},
    "llama": {"llama": True},
}
PREDICTIONS = 3


def family_config(family, *, parallel=None, **changes):
    """A configuration like ``pico_config``'s, of a family."""
    config = pico_config(**(FAMILIES[family] | changes))
    if family.startswith("bert"):
        mlm = dataclasses.replace(config.data.mlm, sentence_pairs="order")
        data = dataclasses.replace(config.data, objective="mlm", mlm=mlm)
        config = dataclasses.replace(config, data=data)
    changed = dataclasses.replace(config.parallel, **(parallel or {}))
    return dataclasses.replace(config, parallel=changed)


def family_batches(config, world, step):
    """This rank's micro-batches of a global batch; every other causal row has a prefix."""
    batches = random_batches(config, world, step)
    if config.model.family == "bert":
        return [_masked(batch, step) for batch in batches]
    for number, batch in enumerate(batches):
        rows = torch.arange(len(batch["tokens"])) + number
        batch["prefix_length"] = torch.where(rows % 2 == 0, 0, 3)
    return batches


def _masked(batch, step):
    """The same rows as masked samples; everything follows from a row's own tokens."""
    tokens = batch["tokens"]
    length = tokens.shape[1]
    places = torch.arange(length)
    lengths = length - tokens[:, :1] % 3
    used = torch.arange(PREDICTIONS) < 1 + tokens[:, 1:2] % PREDICTIONS
    positions = (tokens[:, 2:3] + torch.arange(PREDICTIONS)) % (length - 2)
    return {
        "tokens": tokens,
        "token_types": (places >= 1 + tokens[:, 3:4] % 4).long(),
        "position_ids": batch["position_ids"],
        "padding_mask": places < lengths,
        "masked_positions": positions * used,
        "labels": (batch["labels"][:, :PREDICTIONS] + step) % PICO_VOCABULARY * used,
        "loss_mask": used.float(),
        "sentence_labels": tokens[:, 4] % 2,
    }
