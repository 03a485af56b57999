#!/usr/bin/env python3
"""Conversions against a plain copy of what they wrote, and against DeepSpeed's converter.

python tools/bench/growth/convert.py [--json FILE] [--scratch FOLDER] [--workers N]

States of 0.5 and 1 GiB on four ranks of ZeRO-1; everything in turns, medians of five rounds after
one to warm up, checksums and fsync included.  Needs 6 GiB of disk and one to five minutes.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

import torch

from lag_megatron.checkpoint.open import open_checkpoint
from lag_megatron.checkpoint.state.source import UNSHARDED
from lag_megatron.checkpoint.storage.manifest import STATES_APART
from lag_megatron.checkpoint.writer.job import write
from lag_megatron.checkpoint.zero.reader import ZeroCheckpoint
from lag_megatron.distributed.world import World, start_world, stop_world
from lag_megatron.growth.apply.conversion import Conversion, Format
from lag_megatron.growth.apply.grown_state import GrownState, retarget
from lag_megatron.growth.apply.hardlink_dcp import hardlink_dcp
from lag_megatron.growth.apply.hardlink_universal import hardlink_universal
from tools.bench.common import synthetic
from tools.bench.common.figures import write_figures
from tools.bench.growth.offline_growth import copy_files, run_in_child

SIZES = {"0.5": 12, "1": 24}  # layers of 512 hidden units
RANKS, ROUNDS = 4, 5
HIDDEN, VOCABULARY = 512, 1024
BOUNDS = {
    "convert_copy_ratio": ">= 0.6",
    "convert_vs_ds_to_universal": ">= 3",
    "convert_anon_mb": "<= 128",
    "link_growth_share": "<= 0.01",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="on the disk to be measured")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = start_world(tensor=1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        figures = _all(world, Path(folder), options.workers)
    stop_world()
    for name, value in figures.items():
        print(f"{name:<34} {value:10.3f}   {BOUNDS.get(name, '')}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def _all(world: World, scratch: Path, workers: int) -> dict[str, float]:
    model = asdict(synthetic.config_of(2, hidden=HIDDEN, vocabulary=VOCABULARY).model)
    seed = synthetic.seed_checkpoint(
        world, scratch / "seed", hidden=HIDDEN, vocabulary=VOCABULARY, model=model
    )
    topology = retarget(ZeroCheckpoint.open(seed).topology, world_size=RANKS, precision="bf16")
    figures: dict[str, float] = {}
    for size, layers in SIZES.items():
        source = synthetic.stack(seed, scratch / size, layers=layers, topology=topology)
        _drop_state_checksums(source)
        for form in ("universal", "hf"):
            found = _against_copy(source, form, scratch, workers)
            figures |= {f"{key}_{form}_{size}gib": value for key, value in found.items()}
            peak, _ = run_in_child(lambda s=source, f=form: _convert(s, f, scratch / "out", 1))
            figures[f"convert_anon_mb_{form}_{size}gib"] = peak / 1e6
            shutil.rmtree(scratch / "out")
    source = scratch / "0.5" / synthetic.TAG
    figures |= _against_deepspeed(source, scratch, workers)
    figures |= {f"link_growth_share_{f}": _link_share(source, f, scratch) for f in LINKED}
    # Half a gigabyte is over in a second, of which reading settings takes a part.
    figures["convert_copy_ratio"] = min(
        figures[f"convert_copy_ratio_{form}_1gib"] for form in ("universal", "hf")
    )
    for name in ("convert_anon_mb", "link_growth_share"):
        figures[name] = max(v for key, v in figures.items() if key.startswith(f"{name}_"))
    return figures


def _drop_state_checksums(source: Path) -> None:
    """Remove the checksums of states, which a run's own manifests do not have either."""
    path = source / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"].values():
        entry.pop(STATES_APART, None)
    path.write_text(json.dumps(manifest))


def _convert(source: Path, form: Format, target: Path, workers: int) -> None:
    opened = ZeroCheckpoint.open(source)
    conversion = Conversion(source=opened, to=form, topology=opened.topology)
    write(conversion.job(conversion.target_dir(target)), workers=workers)


def _against_copy(source: Path, form: Format, scratch: Path, workers: int) -> dict[str, float]:
    """Rates of converting and of copying what was written, in turns."""
    out, kept = scratch / "out", scratch / "kept"
    _convert(source, form, out, workers)
    out.rename(kept)
    files = sorted(path for path in kept.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    seconds: dict[str, list[float]] = {"convert": [], "copy": []}
    for _ in range(ROUNDS):
        seconds["convert"].append(_timed(lambda: _convert(source, form, out, workers)))
        shutil.rmtree(out)
        seconds["copy"].append(_timed(lambda: copy_files(files, scratch / "copied", root=kept)))
        shutil.rmtree(scratch / "copied")
    shutil.rmtree(kept)
    convert, copy = (statistics.median(seconds[key]) for key in ("convert", "copy"))
    return {"convert_copy_ratio": copy / convert, "convert_gb_s": size / convert / 1e9}


def _against_deepspeed(source: Path, scratch: Path, workers: int) -> dict[str, float]:
    """Seconds of DeepSpeed's converter over ours, both with the same number of workers.

    DeepSpeed's converter fails on Megatron-Core's empty entries, so it reads a copy of the model
    file without them.
    """
    from deepspeed.checkpoint import ds_to_universal

    copy = scratch / "plain" / source.name
    shutil.copytree(source, copy)
    file = copy / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    states["module"] = {k: v for k, v in states["module"].items() if v is not None}
    torch.save(states | {"universal_checkpoint_info": {}}, file)
    options = argparse.Namespace(
        input_folder=str(copy),
        output_folder=str(scratch / "theirs" / "tag"),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
        os.sync()  # ours is on the disk when it ends

    out = scratch / "out"
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(ROUNDS):
        seconds["theirs"].append(_timed(theirs))
        shutil.rmtree(scratch / "theirs")
        seconds["ours"].append(_timed(lambda: _convert(source, "universal", out, workers)))
        shutil.rmtree(out)
    shutil.rmtree(scratch / "plain")
    theirs_s, ours_s = (statistics.median(seconds[key]) for key in ("theirs", "ours"))
    return {"convert_vs_ds_to_universal": theirs_s / ours_s}


LINKED = {"universal": hardlink_universal, "megatron": hardlink_dcp}


def _link_share(source: Path, form: Format, scratch: Path) -> float:
    """Bytes that linked growth writes over those of the grown state."""
    _convert(source, form, scratch / "linked", 1)
    opened = open_checkpoint(scratch / "linked")
    layers = opened.client_state["num_layers"]
    growth = GrownState(opened, synthetic.duplicate_middle_third(layers), UNSHARDED)
    target = scratch / "grown" / opened.path.name
    write(LINKED[form](growth, target))
    files = [path for path in target.rglob("*") if path.is_file()]
    own = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    for name in ("linked", "grown"):
        shutil.rmtree(scratch / name)
    return own / growth.bytes_to_write


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
