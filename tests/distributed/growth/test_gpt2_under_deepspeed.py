"""GPT-2 of transformers under DeepSpeed alone, grown by its own names and loaded by DeepSpeed."""

import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from conftest import run_ranks
from plain_program import At, gathered, grow
from programs import inspect

from lag_megatron.errors import PlanError
from lag_megatron.growth.plan import GrowthPlan

HIDDEN, VOCABULARY, LENGTH, STEPS = 8, 24, 6, 3
FRESH = {"index": 1, "block_size": 1, "init": "random"}
COPY = {"index": 1, "block_size": 1, "init": "duplicate"}
NEW = "transformer.h.2."


def plan_of(operator, target, **options):
    return GrowthPlan(
        operator=operator, options=options, source_layers=2, target_layers=target, init_std=0.3
    )


PLANS = {
    "duplicate": plan_of("lag", 3, **COPY),
    "random": plan_of("lag", 3, **FRESH),
    "half": plan_of("last", 3, scale=0.5),
    "llama_pro": plan_of("llama_pro", 3),
    "staged": plan_of("staged", 4),
    "staged copies": plan_of("staged", 4, matrices="copy"),
}
KEEPS_THE_FUNCTION = ("llama_pro", "staged", "staged copies")


def build(at, layers):
    import deepspeed
    from transformers import GPT2Config, GPT2LMHeadModel

    deepspeed.init_distributed("gloo")
    torch.manual_seed(7)
    sizes = {"n_embd": HIDDEN, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    config = GPT2Config(
        n_layer=layers, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        **sizes,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=at.config())
    return engine


def train(engine, steps):
    losses = []
    for step in steps:
        seed = torch.Generator().manual_seed(10 * step + engine.global_rank)
        text = torch.randint(0, VOCABULARY, (2, LENGTH), generator=seed)
        loss = engine(input_ids=text, labels=text).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def train_and_save(at, folder):
    """Whole parameters, and the loss of the step that would come next."""
    engine = build(at, layers=2)
    train(engine, range(STEPS))
    engine.save_checkpoint(str(folder), "source")
    return gathered(engine), train(engine, [STEPS])


def load_and_train(at, folder, layers):
    engine = build(at, layers)
    path, _ = engine.load_checkpoint(str(folder), "grown")
    assert path is not None
    return gathered(engine), train(engine, [STEPS])


@pytest.fixture(scope="module", params=[At(1, 2), At(3, 2)], ids=str)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    weights, losses = zip(*run_ranks(train_and_save, 2, request.param, folder), strict=True)
    return SimpleNamespace(
        at=request.param, path=folder / "source", weights=weights[0], losses=losses
    )


@pytest.mark.parametrize("name", PLANS)
def test_deepspeed_loads_what_was_grown(name, source, tmp_path):
    plan = PLANS[name]
    grow(source.path, tmp_path / "grown", plan, source.at)
    results = run_ranks(load_and_train, 2, source.at, tmp_path, plan.target_layers)
    weights, losses = zip(*results, strict=True)
    for key, value in source.weights.items():
        if ".h." not in key:
            assert torch.equal(weights[0][key], value), key
    for layer, origin in enumerate(plan.layer_map):
        if not origin.is_new:
            check_copies(weights[0], layer, source.weights, origin.source)
    if name in KEEPS_THE_FUNCTION:
        assert list(chain(*losses)) == pytest.approx(list(chain(*source.losses)), abs=1e-6)
    else:
        assert all(math.isfinite(loss) for (loss,) in losses)
        assert losses != source.losses
    if name == "duplicate":
        check_copies(weights[0], 2, source.weights, 1)
    if name == "random":
        check_fresh({k.removeprefix(NEW): v for k, v in weights[0].items() if k.startswith(NEW)})


def check_copies(grown, layer, old, source):
    there = f"transformer.h.{source}."
    tails = [key.removeprefix(there) for key in old if key.startswith(there)]
    assert len(tails) == 12
    for tail in tails:
        assert torch.equal(grown[f"transformer.h.{layer}.{tail}"], old[there + tail]), tail


def check_fresh(new):
    for tail, value in new.items():
        if tail.endswith(".bias"):
            assert not value.any(), tail
        elif tail in ("ln_1.weight", "ln_2.weight"):
            assert (value == 1).all(), tail
        else:
            std = 0.3 / math.sqrt(2 * 3) if tail.endswith("c_proj.weight") else 0.3
            assert float(value.std()) == pytest.approx(std, rel=0.35), tail


def test_it_is_said_what_was_taken(source, tmp_path, capsys):
    assert inspect(source.path) == 0
    assert "2 layers (transformer.h.N), " in capsys.readouterr().out
    after_ln = GrowthPlan(operator="post_ln_identity", source_layers=2, target_layers=4)
    with pytest.raises(PlanError, match=r"post-LN models, and .* layers of transformers' GPT-2"):
        grow(source.path, tmp_path / "grown", after_ln, source.at)
    assert not (tmp_path / "grown").exists()
