"""Random Path Training in whole runs, and what layers that do not run cost."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from conftest import PICO_VOCABULARY, pico_config, random_batches, run_ranks, sparing
from whole_runs import lines_of, losses_of, train

from lag_megatron.config import load_config
from lag_megatron.planning.cost import steps_flops, validation_flops_per_token
from lag_megatron.planning.random_paths import LayerPath, path_at

PATHS = ["model.num_layers=5", "stages=[{steps: 8, path_length: 3}, {steps: 8, path_length: 4}, "
         "{steps: 4}]"]  # fmt: skip


def killed_at(step_to_die):
    """Rank 0 dies, as by kill -9, before that step."""

    def fault():
        from lag_megatron.training.training_context import TrainingContext

        honest = TrainingContext.step

        def step(self, engine, step, *, stage):
            if step == step_to_die and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(self, engine, step, stage=stage)

        TrainingContext.step = step

    return fault


@pytest.mark.parametrize(
    ("stage", "update"),
    sparing([(1, "decay"), (3, "freeze"), (2, "freeze"), (0, "decay")], slow=lambda w: w[0] != 1),
)
def test_a_run_that_is_killed_inside_a_stage_goes_on_bit_for_bit(stage, update, tiny, tmp_path):
    overrides = [*PATHS, f"parallel.zero_stage={stage}", f"raptr.update_skipped={update}"]
    run_ranks(train, 2, tiny, tmp_path / "whole", overrides)
    with pytest.raises((ChildProcessError, RuntimeError)):
        run_ranks(train, 2, tiny, tmp_path / "cut", overrides, "auto", killed_at(14))
    assert max(losses_of(tmp_path / "cut", "train/loss")) == 14
    run_ranks(train, 2, tiny, tmp_path / "cut", overrides)
    for key in ("train/loss", "val/loss", "train/layers"):
        assert losses_of(tmp_path / "cut", key) == losses_of(tmp_path / "whole", key)
    layers = losses_of(tmp_path / "whole", "train/layers")
    assert layers == {step: 3 if step <= 8 else 4 if step <= 16 else 5 for step in range(1, 21)}


def test_micro_batches_recomputation_and_ranks_change_no_loss(tiny, tmp_path):
    """They would, if a path were not the same in all of them."""
    dry = [*PATHS, "model.dropout=0.0", "parallel.zero_stage=1"]
    ways = {
        "one": (1, []),
        "two": (2, ["parallel.micro_batch=1"]),
        "again": (2, ["parallel.recompute=layers", "parallel.zero_stage=3"]),
    }
    for name, (ranks, overrides) in ways.items():
        run_ranks(train, ranks, tiny, tmp_path / name, [*dry, *overrides])
    first = losses_of(tmp_path / "one", "train/loss")
    for name in ("two", "again"):
        assert losses_of(tmp_path / name, "train/loss") == pytest.approx(first, abs=2e-5)


def test_paths_inside_stages_then_growth(tiny, tmp_path):
    overrides = [
        "model.num_layers=3",
        "stages=[{steps: 8, path_length: 2}, {steps: 10, num_layers: 5, path_length: [3, 5]}]",
        "optimizer.schedule={warmup_steps: 4, growth_warmup_steps: 5, growth_warmup: new}",
    ]
    run_ranks(train, 2, tiny, tmp_path / "run", overrides)
    assert sorted(losses_of(tmp_path / "run", "train/lr_new_layers")) == [9, 10, 11, 12]
    layers = losses_of(tmp_path / "run", "train/layers")
    assert layers == {step: 2 if step <= 8 else 3 if step <= 13 else 5 for step in range(1, 19)}
    config = load_config(tiny, overrides=overrides)
    decision = json.loads((tmp_path / "run" / "growth01" / "decision.json").read_text())
    probes = len(decision["candidates"])
    assert probes > 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    vocabulary = facts["vocab_size"]
    trained = probes * steps_flops(config, range(8, 11), vocab_size=vocabulary)
    shortened = dataclasses.replace(config.stages[1], path_length=None)
    whole = dataclasses.replace(config, stages=(config.stages[0], shortened))
    full = probes * steps_flops(whole, range(8, 11), vocab_size=vocabulary)
    assert trained < full
    evaluations = sum(len(c["curve"]) for c in decision["candidates"])
    per_token = validation_flops_per_token(config, num_layers=5, vocab_size=vocabulary)
    tokens, rest = divmod(decision["cost"]["flops"] - trained, evaluations * per_token)
    assert rest == 0
    assert 0 < tokens <= config.data.validation_tokens


CANDIDATES = [
    "model.num_layers=6",
    "stages=[{steps: 6}, {steps: 12, growth: {lag: 4, rungs: [2, 4], rule: lag, "
    "pool: {operator: identity, path_length: [[3, 4], 4, 5]}}}]",
]


def test_path_schedules_are_candidates(tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "run", CANDIDATES)
    run = tmp_path / "run"
    pool = json.loads((run / "growth01" / "pool.json").read_text())
    assert [(c["id"], c["path_length"]) for c in pool] == [
        ("identity-p3.4", [3, 4]), ("identity-p4", 4), ("identity-p5", 5),
    ]  # fmt: skip
    decision = json.loads((run / "growth01" / "decision.json").read_text())
    curves = {c["id"]: dict(c["curve"]) for c in decision["candidates"]}
    assert len({curve[0] for curve in curves.values()}) == 1  # nothing has grown
    assert decision["chosen"] == min(curves, key=lambda name: curves[name][4])
    rows = {name: lines_of(run / "growth01" / name, "train.jsonl") for name in curves}
    for name, layers in (("identity-p3.4", 3), ("identity-p4", 4), ("identity-p5", 5)):
        assert [row["train/layers"] for row in rows[name]] == [layers] * 4
    chosen = next(c["path_length"] for c in pool if c["id"] == decision["chosen"])
    (journalled,) = [e for e in lines_of(run, "journal.jsonl") if e["event"] == "decision"]
    assert journalled["path_length"] == chosen
    lengths = chosen if isinstance(chosen, list) else [chosen] * 2
    assert lengths[0] < 6  # a path, whichever won
    found = losses_of(run, "train/layers")
    assert found == {step: 6 if step <= 6 else lengths[step > 12] for step in range(1, 19)}


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 11, 15])
def test_candidates_of_paths_survive_a_kill(step, tiny, tmp_path):
    run_ranks(train, 2, tiny, tmp_path / "whole", CANDIDATES)
    with pytest.raises((ChildProcessError, RuntimeError)):
        run_ranks(train, 2, tiny, tmp_path / "cut", CANDIDATES, "auto", killed_at(step))
    run_ranks(train, 2, tiny, tmp_path / "cut", CANDIDATES)
    for key in ("train/loss", "val/loss", "train/layers"):
        assert losses_of(tmp_path / "cut", key) == losses_of(tmp_path / "whole", key)


def saved_bytes(layers, path):
    """Bytes that autograd keeps of the layers in one forward pass, and how often each part ran."""
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.model import build_model, loss_sums
    from lag_megatron.model.layer_dropping import only_layers

    config = pico_config(num_layers=layers)
    world = start_world(tensor=1)
    model = build_model(
        config.model, config.parallel, num_layers=layers, vocab_size=PICO_VOCABULARY
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ran, kept = [], {}
    for number, layer in enumerate(model.decoder.layers):
        for name, part in layer.named_modules():
            if name:
                part.register_forward_hook(lambda *_, n=number, m=name: ran.append((n, m)))
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = random_batches(config, world, 0)[0]
    held = only_layers(model, path) if path else torch.enable_grad()
    with held, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sums(model, batch)
    loss.sum().backward()
    absent = [
        number
        for number, layer in enumerate(model.decoder.layers)
        if all(p.grad is None for p in layer.parameters())
    ]
    stop_world()
    return sum(kept.values()), {number for number, _ in ran}, absent


def test_layers_that_do_not_run_compute_and_keep_nothing():
    path = LayerPath((0, 2, 5), 6, 1.0)
    ((part, ran, absent),) = run_ranks(saved_bytes, 1, 6, path)
    assert ran == {0, 2, 5}
    assert absent == [1, 3, 4]
    ((short, *_),) = run_ranks(saved_bytes, 1, 3, None)
    ((whole, *_),) = run_ranks(saved_bytes, 1, 6, None)
    assert part == short < whole


def fetched(config, paths):
    """For each step, the layers whose weights ZeRO-3 gathered for it."""

    from lag_megatron.checkpoint.megatron.param_names import LAYER
    from lag_megatron.distributed.world import start_world, stop_world
    from lag_megatron.engine.engine import Engine

    world = start_world(tensor=1)
    layers = config.model.num_layers
    engine = Engine(config, world, num_layers=layers, vocab_size=PICO_VOCABULARY)
    names = {p.ds_id: name for name, p in engine.module.named_parameters()}
    coordinator = engine.deepspeed_engine.optimizer.parameter_offload.get_param_coordinator()
    kind, seen = type(coordinator), set()
    gather = "_PartitionedParameterCoordinator__all_gather_params_"
    honest = getattr(kind, gather)

    def noted(self, params, forward, quantize=False):
        seen.update(int(m["layer"]) for p in params if (m := LAYER.match(names[p.ds_id])))
        return honest(self, params, forward, quantize)

    setattr(kind, gather, noted)
    found = []
    for step, path in enumerate(paths):
        seen.clear()
        engine.train_step(random_batches(config, world, step), step=step, lr=1e-2, path=path)
        found.append(set(seen))
        if step == 3:
            engine.evaluate([random_batches(config, world, 99)])
    stop_world()
    return found


def test_zero_3_does_not_fetch_them():
    config = pico_config(num_layers=6, zero_stage=3)
    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    stage = dataclasses.replace(config.stages[0], path_length=3)
    config = dataclasses.replace(config, deepspeed=deepspeed, stages=(stage,))
    drawn = [path_at(step, config) for step in range(6)]
    paths = [*drawn, drawn[-1], drawn[-1], None, None, drawn[0]]
    everything = set(range(6))
    for found in run_ranks(fetched, 2, config, paths):
        assert found == [everything if path is None else set(path.layers) for path in paths]
