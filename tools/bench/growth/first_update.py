#!/usr/bin/env python3
"""First Adam update after growing, in learning rates, by operator and moment policy.

python tools/bench/growth/first_update.py [--steps 3000] [--json FILE]

A small GPT is trained under the engine, on one CPU process; each grown checkpoint takes one step.
The trap is v = 0 under the inherited step count t: an element's first update is then
(1 - beta1) / (1 - beta1^(t + 1)) * sqrt((1 - beta2^(t + 1)) / (1 - beta2)) learning rates.
`post_ln_identity` is for post-LN models; tests/unit/bench/test_first_update.py has it.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, StageConfig
from lag_megatron.distributed.world import World, start_world, stop_world
from lag_megatron.engine.engine import Engine
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import MOMENT_POLICIES, GrowthPlan
from tools.bench.common.figures import write_figures

LR, BETAS = 1e-3, (0.9, 0.999)
SOURCE, VOCABULARY, LENGTH, BATCH = 4, 128, 32, 8
LAG: Mapping[str, Any] = {"index": 1, "block_size": 1}
# name: (operator, layers after, options)
GROWTHS: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    "lag_duplicate": ("lag", 6, {**LAG, "init": "duplicate"}),
    "lag_half": ("lag", 6, {**LAG, "init": "duplicate", "scale": 0.5}),
    "lag_random": ("lag", 6, {**LAG, "init": "random"}),
    "last": ("last", 6, {}),
    "random_top": ("random_top", 6, {}),
    "random_top_zero": ("random_top", 6, {"scale": 0.0}),
    "progressive": ("progressive", 8, {}),
    "g_stack": ("g_stack", 12, {}),
    "midas": ("midas", 6, {}),
    "interpolate": ("interpolate", 6, {}),
    "slices": ("slices", 6, {"layers": "0-2,1-3"}),
    "llama_pro": ("llama_pro", 6, {}),
}


def main() -> int:
    options = _parser().parse_args()
    world = start_world(tensor=1)
    config = _config(options.steps)
    trap = (1 - BETAS[0]) / (1 - BETAS[0] ** (options.steps + 1))
    trap *= ((1 - BETAS[1] ** (options.steps + 1)) / (1 - BETAS[1])) ** 0.5
    figures = {"steps": float(options.steps), "trap": trap}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _train(config, world, folder, steps=options.steps)
        print(f"|first update| / lr after {options.steps} steps; v = 0 gives {trap:.3f}")
        print("operator         moments  new: max      rms old: max      rms")
        for operator, moments, found in _measure(config, world, folder, step=options.steps):
            numbers = " ".join(f"{value:8.3f}" for value in found.values())
            print(f"{operator:<16} {moments:<8} {numbers}", flush=True)
            figures |= {f"{operator}_{moments}_{key}": value for key, value in found.items()}
    if options.json:
        write_figures(options.json, figures)
    stop_world()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="before growing; 1 / (1 - beta2) "
                        "and more are needed to see the trap")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _config(steps: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=SOURCE,
            hidden_size=32,
            ffn_hidden_size=128,
            num_attention_heads=2,
            num_query_groups=2,
            seq_length=LENGTH,
            vocab_size=VOCABULARY,
        ),
        stages=(StageConfig(steps=steps),),
        optimizer=OptimizerConfig(lr=LR, betas=BETAS, weight_decay=0.0, grad_clip=0.0),
        parallel=ParallelConfig(micro_batch=BATCH, global_batch=BATCH),
    )


def _train(config: RunConfig, world: World, folder: Path, *, steps: int) -> None:
    engine = Engine(config, world, num_layers=SOURCE, vocab_size=VOCABULARY)
    for step in range(steps):
        result = engine.train_step([_batch(step)], step=step, lr=LR)
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {result.loss:.3f}", file=sys.stderr, flush=True)
    engine.save(folder, "source", client_state={"step": steps})
    engine.destroy()


def _measure(
    config: RunConfig, world: World, folder: Path, *, step: int
) -> Iterator[tuple[str, str, dict[str, float]]]:
    engines: dict[int, Engine] = {}
    for name, (operator, target, options) in GROWTHS.items():
        if target not in engines:
            engines[target] = Engine(config, world, num_layers=target, vocab_size=VOCABULARY)
        for moments in (*MOMENT_POLICIES, "auto"):
            plan = GrowthPlan(
                operator=operator,
                options=options,
                source_layers=SOURCE,
                target_layers=target,
                moments=moments,
            )
            grown = folder / name / moments
            grow_checkpoint(folder / "source", grown, plan)
            engines[target].load(grown)
            yield name, moments, _first_update(engines[target], plan, step)


def _first_update(engine: Engine, plan: GrowthPlan, step: int) -> dict[str, float]:
    """Largest and root-mean-square |update| / lr of the new layers' elements and of the old's."""
    before = _weights(engine)
    engine.train_step([_batch(step)], step=step, lr=LR)
    after = _weights(engine)
    found: dict[str, float] = {}
    for kind, is_new in (("new", True), ("old", False)):
        marks = [f".layers.{i}." for i, o in enumerate(plan.layer_map) if o.is_new is is_new]
        names = [name for name in before if any(mark in name for mark in marks)]
        moved = torch.cat([(after[name] - before[name]).flatten() for name in names]).abs() / LR
        found[f"{kind}_max"] = float(moved.max())
        found[f"{kind}_rms"] = float(moved.square().mean().sqrt())
    return found


def _weights(engine: Engine) -> dict[str, torch.Tensor]:
    parameters = engine.module.named_parameters()
    return {name: parameter.detach().double().clone() for name, parameter in parameters}


def _batch(step: int) -> dict[str, torch.Tensor]:
    """Random text in which a token mostly depends on the one before it."""
    generator = torch.Generator().manual_seed(step)
    columns = [torch.randint(VOCABULARY, (BATCH,), generator=generator)]
    for _ in range(LENGTH):
        noise = torch.randint(VOCABULARY, (BATCH,), generator=generator)
        is_noise = torch.rand(BATCH, generator=generator) < 0.2
        columns.append(torch.where(is_noise, noise, (5 * columns[-1] + 3) % VOCABULARY))
    text = torch.stack(columns, 1)
    return {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "loss_mask": torch.ones(BATCH, LENGTH),
    }


if __name__ == "__main__":
    sys.exit(main())
