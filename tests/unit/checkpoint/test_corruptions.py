"""Planted corruptions of a checkpoint: the inspection names each, and growth refuses each.

With the manifest that a committed checkpoint has, every changed byte is found.  Without one, as
another program would leave it, there are the checksums that ``torch.save`` keeps of its records,
and what the files say about themselves.  Two cases can then not be told in principle, and are
planted under a manifest alone: a shard of another run with the same shapes at the same step, and
two swapped shards of ZeRO-3, which say nothing of their rank.  (A few bytes behind a file's end
change nothing of what is read, so without a manifest they are no matter either.)
"""

import random
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import pico_config, run_ranks, train_and_save
from corrupting import (
    FIRST,
    MODEL,
    MODEL3,
    SHARD,
    THIRD,
    another_header,
    append,
    cut,
    damage_manifest,
    directory,
    edit,
    edit_manifest,
    evil,
    flip,
    header,
    larger_with_smaller_shards,
    name_a_missing_file,
    remove,
    storage,
    swap,
    swap_shapes,
    take,
    three_ranks,
    weight,
    zero_page,
)
from programs import inspect

from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import CheckpointError, PlanError
from lag_megatron.growth.apply.grow_zero import grow_checkpoint
from lag_megatron.growth.plan import GrowthPlan

PLAN = GrowthPlan(
    operator="lag",
    options={"index": 0, "block_size": 1, "init": "duplicate"},
    source_layers=2,
    target_layers=3,
)


@pytest.fixture(scope="module")
def others(checkpoint, tmp_path_factory):
    """Further checkpoints, made where first asked for; never to be changed."""
    config, known = pico_config(), {"zero1": checkpoint}
    ways = {
        "later": (config, 2, 4),
        "other run": (replace(config, seed=99), 2, 3),
        "larger": (replace(config, parallel=replace(config.parallel, global_batch=6)), 3, 3),
        "zero3": (pico_config(zero_stage=3), 2, 3),
    }

    def other(name):
        if name not in known:
            config, world, steps = ways[name]
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            run_ranks(_train_and_save, world, config, folder, steps)
            known[name] = folder / "step3"
        return known[name]

    return other


def _train_and_save(config, folder, steps):
    train_and_save(config, folder, steps=steps)


@dataclass(frozen=True)
class Case:
    """A corruption, and what the message says of it under a manifest and without (None: neither).

    ``base`` is the checkpoint that it is planted in.
    """

    name: str
    corrupt: Callable[[Path, Callable[[str], Path]], None]
    bare: str | None
    listed: str | None
    base: str = "zero1"


CONTENT = ".*differs from its checksum"
SIZE = r"\d+ bytes, but \d+ were written"
CUT = r"damaged or cut short \(\d+ bytes\)"
CASES = [
    *(
        Case(f"cut at {share}", cut(SHARD, share), f"{SHARD}: {CUT}", f"{SHARD}: {SIZE}")
        for share in (0.1, 0.5, 0.99)
    ),
    Case("cut model", cut(MODEL, 0.7), f"{MODEL}: {CUT}", f"{MODEL}: {SIZE}"),
    *(
        Case(
            f"flip in {state}",
            flip(SHARD, storage(state)),
            f"{SHARD}: .*/data/{CONTENT}",
            f"{SHARD}:{CONTENT}",
        )
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    ),
    Case(
        "flip in a weight",
        flip(MODEL, weight("decoder.layers.1.mlp.linear_fc1.weight")),
        f"{MODEL}: .*/data/{CONTENT}",
        f"{MODEL}:{CONTENT}",
    ),
    Case("flip in the pickle", flip(SHARD, header), SHARD, SHARD),
    Case("flip in the zip directory", flip(SHARD, directory), SHARD, SHARD),
    Case("zeroed page", zero_page(SHARD), f"{SHARD}:{CONTENT}", f"{SHARD}:{CONTENT}"),
    Case("missing shard", remove(SHARD), f"1 of 3 files are missing .{SHARD}", f"{SHARD}: missing"),
    Case("missing model", remove(MODEL), f"{MODEL}.* is there", f"{MODEL}: missing"),
    Case("empty shard", cut(SHARD, 0), f"{SHARD}: {CUT}", f"{SHARD}: {SIZE}"),
    Case("empty model", cut(MODEL, 0), f"{MODEL}: {CUT}", f"{MODEL}: {SIZE}"),
    Case(
        "shard of another step",
        take(SHARD, "later"),
        rf"{SHARD}: of step \[4, 4\], but the first file is of step \[3, 3\]",
        f"{SHARD}: ",
    ),
    Case("shard of another run", take(SHARD, "other run"), None, f"{SHARD}:{CONTENT}"),
    Case(
        "swapped shards",
        swap(FIRST, SHARD),
        f"{FIRST}: it is not this rank's shard",
        f"{FIRST}: ",
    ),
    Case(
        "swapped shards of ZeRO-3",
        swap(FIRST, SHARD),
        None,
        f"{FIRST}:{CONTENT}",
        base="zero3",
    ),
    Case(
        "the same shard twice",
        lambda folder, others: shutil.copyfile(folder / FIRST, folder / SHARD),
        f"{SHARD}: it is not this rank's shard",
        f"{SHARD}: ",
    ),
    Case(
        "left over from a larger world",
        take(THIRD, "larger"),
        f"holds 1 files .{THIRD}.* different worlds are mixed",
        f"holds 1 files .{THIRD}.* different worlds are mixed",
    ),
    Case(
        "smaller world under a larger header",
        another_header,
        f"1 of 4 files are missing .{THIRD}",
        f"{MODEL}: ",
    ),
    Case(
        "smaller world among larger shards",
        larger_with_smaller_shards,
        f"{FIRST}: fp32 of buffer 0 has .* but its parameters take",
        f"{MODEL}: ",
    ),
    Case(
        "ZeRO-3 beside ZeRO-1",
        take(MODEL3, "zero3"),
        f"holds 1 files .{MODEL3}.* do not belong to a ZeRO-1",
        f"holds 1 files .{MODEL3}.* do not belong to a ZeRO-1",
    ),
    Case(
        "ZeRO-3 in place of ZeRO-1",
        take(SHARD, "zero3"),
        f"{SHARD}: fp32 of buffer 0 is missing",
        f"{SHARD}: ",
    ),
    Case(
        "manifest cut",
        damage_manifest,
        None,
        "manifest.json: expected a checkpoint's manifest, but",
    ),
    Case(
        "manifest with a missing file",
        edit_manifest(name_a_missing_file),
        None,
        f"{THIRD}: missing",
    ),
    Case(
        "manifest of another checkpoint", take(manifest.MANIFEST, "other run"), None, f"{MODEL}: "
    ),
    Case("appended bytes", append(SHARD, 100), None, f"{SHARD}: {SIZE}"),
    Case("appended kilobytes", append(SHARD, 2**17), f"{SHARD}: {CUT}", f"{SHARD}: {SIZE}"),
    Case("evil shard", evil(SHARD), f"{SHARD}: holds objects that no DeepSpeed", f"{SHARD}: "),
    Case("evil model", evil(MODEL), f"{MODEL}: holds objects that no DeepSpeed", f"{MODEL}: "),
    Case(
        "list of parameters in another order",
        edit(MODEL, swap_shapes),
        f"{FIRST}: it is not this rank's shard: for decoder.layers.[01].mlp.linear_fc1.weight",
        f"{FIRST}: it is not this rank's shard",
    ),
    Case(
        "list of parameters in another order under ZeRO-3",
        edit(MODEL3, swap_shapes),
        f"{MODEL3}: its param_shapes list other parameters, or in another order",
        f"{MODEL3}: ",
        base="zero3",
    ),
    Case(
        "model file of another step under ZeRO-3",
        lambda folder, others: edit(MODEL3, lambda objects: objects.update(global_steps=4))(
            folder, others
        ),
        f"{MODEL3}: of step 4, but the first file is of step 3",
        f"{MODEL3}: ",
        base="zero3",
    ),
    Case(
        "wrong number of ranks", edit(MODEL, three_ranks), f"missing .{THIRD}", f"missing .{THIRD}"
    ),
]


def planted(case, others, tmp_path, *, bare):
    folder = shutil.copytree(others(case.base), tmp_path / "source" / "step3")
    if bare:
        (folder / manifest.MANIFEST).unlink()
    case.corrupt(folder, others)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


TESTS = [
    pytest.param(case, bare, id=f"{case.name.replace(' ', '-')}-{'bare' if bare else 'manifest'}")
    for case in CASES
    for bare in (False, True)
    if (case.bare if bare else case.listed) is not None
]


@pytest.mark.parametrize(("case", "bare"), TESTS)
def test_corruptions_are_named_and_refused(case, bare, others, tmp_path, capsys):
    folder = planted(case, others, tmp_path, bare=bare)
    before = files_of(folder)
    reason = case.bare if bare else case.listed

    capsys.readouterr()
    assert inspect(folder, "--verify") == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.search(reason, printed), printed

    target = tmp_path / "target" / "step3"
    with pytest.raises((CheckpointError, PlanError), match=reason):
        grow_checkpoint(folder, target, PLAN)
    assert not target.exists()
    assert not manifest.temporary(target).exists()
    assert not (target.parent / "latest").exists()
    assert files_of(folder) == before
    assert not list(tmp_path.rglob("it_ran"))


@pytest.mark.parametrize("name", [MODEL, SHARD])
def test_a_bit_that_flips_anywhere_is_refused_or_of_no_matter(name, checkpoint, tmp_path):
    """Without a manifest: dates in the archive and the space between its records do not matter."""
    grow_checkpoint(checkpoint, tmp_path / "expected", PLAN)
    expected = manifest.read_manifest(tmp_path / "expected")["files"]
    source = shutil.copytree(checkpoint, tmp_path / "source")
    (source / manifest.MANIFEST).unlink()
    data = (source / name).read_bytes()
    with zipfile.ZipFile(source / name) as archive:
        pickled = next(r for r in archive.infolist() if r.filename.endswith("/data.pkl"))
        ranges = [
            range(pickled.header_offset, pickled.header_offset + pickled.file_size),
            range(archive.start_dir, len(data)),
            range(len(data)),
        ]
    chance, refusals = random.Random(0), 0
    for number in range(90):
        spoilt = bytearray(data)
        spoilt[chance.choice(ranges[number % 3])] ^= 1 << chance.randrange(8)
        (source / name).write_bytes(spoilt)
        target = tmp_path / str(number)
        refusal = None
        try:
            grow_checkpoint(source, target, PLAN)
        except CheckpointError as error:
            refusal = str(error)
        if refusal is None:
            assert manifest.read_manifest(target)["files"] == expected
            shutil.rmtree(target)
        else:
            assert name in refusal
            assert not target.exists()
            refusals += 1
    assert refusals > 60
