"""Checkpoints of a plain program: torch's modules under DeepSpeed, without any engine of ours.

The model has what ours has not: a tied output, frozen parameters, buffers, a scheduler of learning
rates, a client state, and fp16 with a dynamic loss scale.  What is grown is compared with whole
tensors that an independent reader takes from the shards, or that the running model gathered.
"""

import subprocess
import sys
from itertools import groupby

import pytest
import torch
from conftest import run_ranks
from full_state import differences, grow_full, tree_differences
from plain_program import (
    CLIENT_STATE,
    DTYPES,
    GROW,
    LAYERS,
    LENGTH,
    STEPS,
    At,
    grow,
    load,
    load_and_save,
    train_and_save,
)

from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.errors import CheckpointError
from lag_megatron.growth.apply.conversion import Conversion
from lag_megatron.growth.plan import GrowthPlan

KEEP4 = GrowthPlan(operator="identity", source_layers=4, target_layers=4)
KEEP = GrowthPlan(operator="identity", source_layers=2, target_layers=2)
WAYS = [
    (GROW, At(1, 2), At(3, 3)),
    (GROW, At(1, 2), At(1, 1)),
    (GROW, At(1, 3, "bf16"), At(2, 2, "bf16")),
    (GROW, At(1, 3, "bf16"), At(3, 2)),
    (GROW, At(1, 3, "bf16", wide_gradients=True), At(3, 2, "bf16")),
    (GROW, At(2, 3), At(1, 2, "bf16")),
    (GROW, At(2, 2, "fp16"), At(3, 3, "fp16")),
    (GROW, At(2, 2, "fp16"), At(1, 1, "fp16")),
    (GROW, At(3, 2), At(2, 3, "fp16")),
    (GROW, At(3, 3, "bf16"), At(1, 2)),
    (GROW, At(3, 3, "fp16"), At(2, 2, "bf16")),
    (KEEP, At(3, 3, "fp16"), At(3, 1, "fp16")),
    (KEEP, At(2, 3), At(2, 3)),
]
# Sources of test_deepspeed_takes_what_was_grown.
RECOVERED = [
    (At(1, 2), At(1, 3)),
    (At(1, 3, "bf16"), At(2, 2, "bf16")),
    (At(1, 3, "bf16", wide_gradients=True), At(1, 2, "bf16")),
    (At(2, 2, "fp16"), At(3, 3, "fp16")),
    (At(3, 2), At(3, 1)),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder and whole parameters of a checkpoint of each source topology."""
    wanted = sorted({before for _, before, _ in WAYS}, key=lambda at: (at.world, str(at)))
    known = {}
    for world, group in groupby(wanted, key=lambda at: at.world):
        ways = [(at, tmp_path_factory.mktemp(str(at))) for at in group]
        found = run_ranks(train_and_save, world, ways)
        for number, (at, folder) in enumerate(ways):
            known[at] = (folder / "source", found[0][number])
    return known


def grown(state, layers):
    """``grow_full`` for a model whose layers' names begin with ``layers``."""
    dotted = {(kind, f".{name}"): value for (kind, name), value in state.items()}
    return {(kind, name[1:]): v for (kind, name), v in grow_full(dotted, layers).items()}


def expected_of(source, parameters, before, after, layers):
    """Trained parameters' state, steps, and the forward pass's parameters of the grown model."""
    state, steps = before.read(source)
    masters = {key: value for key, value in state.items() if key[0] == "fp32"}
    trained = {name for _, name in masters} | {"lm_head.weight"}
    frozen = {("frozen", n): p for n, p in parameters.items() if n not in trained}
    assert {name for _, name in frozen} == {
        "position.weight",
        "layers.0.mix.weight",
        "layers.1.mix.weight",
    }
    whole = {n: v for (_, n), v in grown(masters | frozen, layers).items()}
    whole["lm_head.weight"] = whole["embed.weight"]
    weights = {name: value.to(DTYPES[after.precision]) for name, value in whole.items()}
    wanted = {key: v for key, v in grown(state, layers).items() if key[0] != "weight"}
    return wanted, steps, weights


@pytest.mark.parametrize(
    ("plan", "before", "after"), WAYS, ids=lambda v: getattr(v, "operator", str(v))
)
def test_deepspeed_takes_what_was_grown(plan, before, after, sources, tmp_path):
    source, parameters = sources[before]
    grow(source, tmp_path / "grown", plan, after)
    layers = LAYERS if plan is GROW else LAYERS[::2]
    results = run_ranks(load_and_save, after.world, after, tmp_path, len(layers))
    wanted, steps, weights = expected_of(source, parameters, before, after, layers)
    for tag in ("grown", "again"):
        found, counts = after.read(tmp_path / tag)
        assert counts == steps
        moved = {key: value for key, value in found.items() if key[0] != "weight"}
        assert differences(moved, wanted) == [], tag
    for client_state, loaded, losses in results:
        del client_state["lag"]
        assert tree_differences(client_state, CLIENT_STATE) == []
        assert differences(loaded, weights) == []
        assert losses[0] < 10
    for file in sorted((tmp_path / "grown").glob("*.pt")):
        again = torch.load(tmp_path / "again" / file.name, weights_only=False)
        found = tree_differences(torch.load(file, weights_only=False), again)
        assert [d for d in found if not d.startswith("/ds_config")] == [], file.name


@pytest.mark.parametrize(
    ("plan", "before", "after"), WAYS, ids=lambda v: getattr(v, "operator", str(v))
)
def test_what_does_not_grow_is_the_sources(plan, before, after, sources, tmp_path):
    source, _ = sources[before]
    grow(source, tmp_path / "grown", plan, after)
    old, new = (load(folder, "*model_states.pt") for folder in (source, tmp_path / "grown"))
    kept = (*CLIENT_STATE, "lr_scheduler", "global_steps", "skipped_steps", "global_samples")
    for key in (*kept, "ds_version", "shared_params"):
        assert tree_differences(old[key], new[key]) == [], key
    assert old["lr_scheduler"]["last_epoch"] == old["global_steps"] == STEPS
    assert new["shared_params"] == {"lm_head.weight": "embed.weight"}
    gains = {name: value.tolist() for name, value in new["module"].items() if "gain" in name}
    origins = [layer for layer, _ in (LAYERS if plan is GROW else LAYERS[::2])]
    assert gains == {
        f"layers.{layer}.gain": torch.tensor([0.3 + old]).tolist()
        for layer, old in enumerate(origins)
    }
    assert set(new["buffer_names"]) == {"places", *gains}
    scalers = [
        load(folder, "*optim_states.pt")["optimizer_state_dict"].get("loss_scaler")
        for folder in (source, tmp_path / "grown")
    ]
    if after.precision != "fp16":
        assert (type(scalers[1]).__name__, scalers[1].cur_scale) == ("LossScaler", 1.0)
    elif before.precision == "fp16":
        assert tree_differences(*scalers) == []
        assert scalers[1].cur_scale != 2**5
        assert (scalers[1].scale_window, scalers[1].delayed_shift) == (2, 3)
        assert (scalers[1].min_scale, scalers[1].cur_iter) == (2, STEPS)
    else:
        assert (type(scalers[1]).__name__, scalers[1].cur_scale) == ("DynamicLossScaler", 2**16)


@pytest.mark.parametrize(("before", "after"), RECOVERED, ids=str)
def test_deepspeeds_recovery_program_reads_what_was_grown(before, after, sources, tmp_path):
    """``zero_to_fp32.py``: weights in fp32 without any engine; of ZeRO-1 it leaves out frozen."""
    from deepspeed.utils import zero_to_fp32

    source, parameters = sources[before]
    grow(source, tmp_path / "step", GROW, after)
    _, _, weights = expected_of(source, parameters, before, after, LAYERS)
    state, _ = before.read(source)
    wanted = {name: v for (kind, name), v in grown(state, LAYERS).items() if kind == "fp32"}
    wanted["lm_head.weight"] = wanted["embed.weight"]
    if after.stage > 1:
        wanted |= {name: v for name, v in weights.items() if name not in wanted}
    gains = {f"layers.{n}.gain": torch.tensor([0.3 + old]) for n, (old, _) in enumerate(LAYERS)}
    wanted |= {"places": torch.arange(LENGTH), **gains}

    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert differences(found, wanted) == []

    script = source.parent / "zero_to_fp32.py"  # DeepSpeed's save left it there for its user
    arguments = [sys.executable, script, tmp_path, tmp_path / "out", "--tag", "step"]
    subprocess.run(arguments, check=True, capture_output=True)
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert differences(found, wanted) == []


def test_without_zero_the_order_is_not_known(tmp_path):
    at = At(0, 1)
    run_ranks(train_and_save, at.world, [(at, tmp_path)])
    with pytest.raises(CheckpointError, match=r"keeps its optimizer state by number.*ZeRO-1"):
        grow(tmp_path / "source", tmp_path / "grown" / "step", GROW, At(1, 2))
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("before", [At(1, 2), At(3, 3, "bf16")], ids=str)
def test_every_stage_in_turn_keeps_what_it_does_not_list(before, sources, tmp_path):
    """Whether a parameter is frozen, a buffer or an alias has to survive where no list says so."""
    source, parameters = sources[before]
    for number, at in enumerate((At(1, 3), At(0, 1), At(3, 2), At(2, 1), At(1, 2))):
        grow(source, tmp_path / str(number), KEEP4 if number else GROW, at)
        source = tmp_path / str(number)
    wanted, steps, weights = expected_of(sources[before][0], parameters, before, At(1, 2), LAYERS)
    found, counts = At(1, 2).read(source)
    assert counts == steps
    assert differences({k: v for k, v in found.items() if k[0] != "weight"}, wanted) == []
    module = load(source, "*model_states.pt")["module"]
    assert differences({name: module[name] for name in weights}, weights) == []


@pytest.mark.parametrize("at", [At(1, 2), At(2, 3)], ids=str)
def test_nothing_is_lost_through_universal(at, sources, tmp_path):
    """Tied and frozen parameters, buffers, schedules and counters of a model that is not ours."""
    source, _ = sources[at]
    ways = [("universal", "u"), ("zero", "z")]
    here = source
    for form, name in ways:
        opened = open_checkpoint(here)
        topology = ZeroCheckpoint.open(source).topology
        conversion = Conversion(source=opened, to=form, topology=topology)
        here = conversion.target_dir(tmp_path / name)
        write(conversion.job(here))
    before, after = at.read(source), at.read(here)
    assert after[1] == before[1]
    assert differences(after[0], before[0]) == []
    old, new = (load(folder, "mp_rank_00_model_states.pt") for folder in (source, here))
    assert tree_differences(dict(old["module"]), dict(new["module"])) == []
    for key in ("shared_params", "buffer_names", "lr_scheduler", "global_steps", *CLIENT_STATE):
        assert tree_differences(old[key], new[key]) == [], key
