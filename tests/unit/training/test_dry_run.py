"""The dry run: every configuration, the demo's numbers by hand, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lag_megatron.config import RunConfig, load_config
from lag_megatron.errors import ConfigError, PlanError
from lag_megatron.planning.vocab_size import estimate_vocab_size
from lag_megatron.training.dry_run import describe_run, state_bytes_per_parameter

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def demo(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "demo.yaml", overrides=overrides)


# Fixed here, so that tuning the demo leaves the hand-made numbers below true.
FIXED = (
    "stages=[{steps: 600}, {steps: 200, num_layers: 6}]",
    "growth.rule=lag",
    "growth.lag=40",
    "growth.rungs=[10, 20, 40]",
    "growth.probe_groups=1",
    "model={family: gpt, num_layers: 4, hidden_size: 128, ffn_hidden_size: 512, "
    "num_attention_heads: 4, num_query_groups: 4, seq_length: 128}",
    "data.tokenizer={type: bpe, vocab_size: 4000}",
    "data.validation_tokens=65536",
    "parallel={micro_batch: 8, global_batch: 32, zero_stage: 1}",
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_dry_runs(path: Path) -> None:
    config = load_config(path)
    text = describe_run(config, world_size=config.parallel.world_size or 2)
    assert "== learning rate ==" in text
    assert max(map(len, text.splitlines()[-14:])) <= 100


def test_the_demos_numbers_by_hand() -> None:
    text = describe_run(demo(*FIXED), world_size=2)
    layer = 4 * 128 * 128 + 2 * 128 * 512 + (3 * 128 + 128 + 512 + 128) + 4 * 128
    embeddings = 4096 * 128 + 128 * 128 + 2 * 128
    small, large = (count * layer + embeddings for count in (4, 6))
    assert f"{small:,}" in text
    assert f"{large:,}" in text
    per_token = [
        6 * (count * 12 * 128 * 128 + 4096 * 128) + 6 * count * 128 * 128 for count in (4, 6)
    ]
    stages = [600 * 4096 * per_token[0], 200 * 4096 * per_token[1]]
    for flops in (*stages, sum(stages)):
        assert f"{flops:.3e}" in text
    assert "4,096 (an estimate from data.tokenizer.vocab_size)" in text
    assert f"{800 * 4096:,}" in text
    # ZeRO 1 on two ranks in fp32: 4 + 4 bytes, and half of 4 + 8.
    assert f"{small * 14 / 2**20:,.1f}" in text
    assert f"{small * 16 / 2**20:,.1f}" in text
    assert "12 x 40 = 480 probe steps" in text
    assert "440 extra steps = 55.0% of the run's, 220.0% of the stage's" in text
    extra = 440 * 4096 * per_token[1]
    share = f"{extra / sum(stages):.1%}"
    assert f"{extra:.3e} FLOPs of training = {share} of the run's, 220.0% of the stage's" in text
    validation = 48 * 65536 * per_token[1] // 3
    assert f"{validation:.3e} FLOPs in 48 evaluations" in text
    assert "i1-b2-duplicate  1 2 3 2* 3* 4\n" in text


def test_the_curve_shows_warm_up_decay_and_stages() -> None:
    schedule = "optimizer.schedule={name: cosine, warmup_steps: 400, min_lr: 0}"
    lines = describe_run(demo(*FIXED, "optimizer.lr=2.0e-3", schedule), world_size=1).splitlines()
    top = next(line for line in lines if line.startswith(" 2.00e-03 |"))
    assert 30 < top.index("#") < 50
    marks = next(line for line in lines if line.startswith("    stage  0"))
    assert marks.index("1") == 11 + 54


def test_a_pool_of_one_costs_nothing_extra() -> None:
    text = describe_run(demo(*FIXED, "growth.pool={operator: last}"), world_size=1)
    assert "A pool of one" in text
    assert "1 growth, 1 candidates: 0 extra steps = 0.0% of the run's" in text


def test_several_growths_are_summed() -> None:
    stages = "stages=[{steps: 600}, {steps: 200, num_layers: 6}, {steps: 200, num_layers: 7}]"
    text = describe_run(demo(*FIXED, stages), world_size=1)
    assert "2 growths, 24 candidates: 880 extra steps = 88.0% of the run's" in text


def test_the_papers_adaptive_stacking() -> None:
    """Karp et al. 2024, appendix A.3: 93 candidates of which 88 train 200 steps for nothing."""
    config = load_config(ROOT / "configs" / "bert_large_stacking.yaml")
    text = describe_run(config, world_size=8)
    assert "5 growths, 93 candidates: 17,600 extra steps = 1.8% of the run's" in text
    # By hand: 24 matrices of 12 d^2 a layer, attention, and a head at 77 of 512 positions.
    d, s, vocab = 1024, 512, estimate_vocab_size(config)[0]
    head = 6 * 77 / s * (vocab * d + d * d)
    flops = {n: 6 * n * 12 * d * d + 12 * n * d * s + head for n in (4, 8, 12, 16, 20, 24)}
    steps = dict.fromkeys(flops, 160_000) | {24: 200_000}
    share = sum(steps[n] * flops[n] for n in flops) / (1e6 * flops[24])
    found = re.search(r"The stages take \S+,\n([\d.]+)% less", text)
    assert found
    assert float(found[1]) == pytest.approx(100 * (1 - share), abs=0.06)


def test_without_growth() -> None:
    text = describe_run(demo(*FIXED, "stages=[{steps: 1}]"), world_size=1)
    assert "== growth" not in text


@pytest.mark.parametrize(
    ("zero_stage", "precision", "expected"),
    [
        (0, "fp32", (4, 4, 8)),
        (0, "bf16", (2, 2, 12)),
        (1, "bf16", (2, 2, 3)),
        (2, "bf16", (2, 0.5, 3)),
        (3, "bf16", (0.5, 0.5, 3)),
    ],
)
def test_bytes_by_zero_stage(
    zero_stage: int, precision: str, expected: tuple[float, float, float]
) -> None:
    config = demo(f"parallel.zero_stage={zero_stage}", f"parallel.precision={precision}")
    sizes = state_bytes_per_parameter(config.parallel, replicas=4)
    assert tuple(sizes.values()) == expected
    factored = state_bytes_per_parameter(config.parallel, replicas=4, optimizer="adafactor")
    share = 4 if zero_stage else 1
    assert factored["optimizer"] == expected[2] - 8 / share


def test_vocabulary_of_a_tokenizer_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = f"data.tokenizer={{type: file, path: {path}, vocab_size: 300}}"
    assert estimate_vocab_size(demo(tokenizer))[0] == 384
    tree = {"model": {"vocab": {"a": 0, "b": 599}}, "added_tokens": [{"id": 640, "content": "x"}]}
    path.write_text(json.dumps(tree))
    size, origin = estimate_vocab_size(demo(tokenizer))
    assert (size, origin) == (768, f"read from {path}")
    path.write_text(json.dumps({"model": {"vocab": [["a", 0.0]] * 128}}))
    assert estimate_vocab_size(demo(tokenizer))[0] == 128
    path.write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer"):
        estimate_vocab_size(demo(tokenizer))
    assert estimate_vocab_size(demo("model.vocab_size=5000")) == (5000, "given")


def test_impossible_growth_and_batches_are_refused() -> None:
    with pytest.raises(PlanError, match="Largest target: 8"):
        describe_run(demo("stages=[{steps: 600}, {steps: 200, num_layers: 9}]"), world_size=2)
    with pytest.raises(ConfigError, match=r"parallel\.global_batch"):
        describe_run(demo(*FIXED), world_size=3)


def test_a_dry_run_and_a_report_need_no_torch() -> None:
    code = (
        "import sys, lag_megatron.report, lag_megatron.training.dry_run\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_halving_costs_what_its_rungs_cost() -> None:
    text = describe_run(demo(*FIXED, "growth.rule=halving"), world_size=2)
    # 12 to step 10, 4 to step 20, 2 to step 40: 120 + 40 + 40.
    assert "12 to step 10, 4 to step 20, 2 to step 40 = 200 probe steps" in text
    assert "160 extra steps = 20.0% of the run's, 80.0% of the stage's" in text
    assert "up to 12 x 40 steps" in text


def test_an_exhaustive_search_costs_the_stage_for_every_candidate() -> None:
    text = describe_run(demo(*FIXED, "growth.exhaustive=true"), world_size=2)
    assert "Exhaustive: 12 x 200 = 2,400 probe steps; the winner's 200 go on" in text
    assert "2,200 extra steps = 275.0% of the run's" in text


def test_an_unknown_lag_costs_at_most_the_last_rung() -> None:
    settings = "growth={lag: auto, rungs: [5, 10, 20, 40]}"
    text = describe_run(demo(*FIXED[:2], settings, *FIXED[4:]), world_size=2)
    assert "lag auto, at most 12 x 40 = 480 probe steps" in text


def test_sentinels_and_modes_count_in_an_estimated_vocabulary() -> None:
    config = demo("data.tokenizer={vocab_size: 1024, sentinels: 64}", "data.objective=ul2")
    assert estimate_vocab_size(config)[0] == 1152  # 1024 + 64 + [R] [S] [X], rounded up
