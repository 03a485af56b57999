"""Checkpoints of each format: shards with and without manifest, pointers, indices, settings."""

import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

from conftest import pico_config, run_ranks, train_and_save
from foreign_checkpoints import gpt2, llama, pickled, plain, torch_dist, universal
from kind import Kind

import lag_megatron as lag
from lag_megatron.checkpoint.inspect import UNVERIFIED
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.errors import CheckpointError

_NO_CHECKSUM = "no checksum covers values that were saved anew with sound checksums"
_NO_CHECKSUM_AT_ALL = "the format has no checksum of values"
_ADVICE = "what the format does not need may differ"
TAG, BARE = "step3", "bare"


def _converted(place: str, folder: Path) -> object:
    """What a conversion makes of a checkpoint that the inspection finds sound."""
    path = folder / place
    found = lag.inspect(path, verify=True)
    if problems := [text for text in found.problems if text != UNVERIFIED]:
        raise CheckpointError("\n".join(problems))
    with tempfile.TemporaryDirectory() as target:
        written = lag.convert(
            path, target, to="zero", workers=1, progress=lambda count: None, lock=False
        )
        files = manifest.read_manifest(written)["files"]
    return found.step, found.layers, {name: entry["xxh3_128"] for name, entry in files.items()}


def _zero(stage: int, folder: Path) -> None:
    run_ranks(train_and_save, 2, pico_config(zero_stage=stage), folder)
    shutil.copytree(folder / TAG, folder / BARE, ignore=shutil.ignore_patterns("manifest.json"))


@cache
def _zero_of(stage: int) -> partial:
    return partial(_zero, stage)


def _made(make, folder: Path) -> None:
    (folder / TAG).mkdir()
    made = make(folder / TAG)
    if made != folder / TAG:
        made.rename(folder / "made")
        shutil.rmtree(folder / TAG)
        (folder / "made").rename(folder / TAG)


@cache
def _made_by(make, *arguments) -> partial:
    return partial(_made, lambda folder: make(folder, *arguments))


def _stacked(folder: Path) -> Path:
    return torch_dist(folder, {})


def _flat(folder: Path) -> Path:
    return plain(folder, flat=True)


def _kind(name, modules, build, file, form, *, place=TAG, values="", data="", names=()) -> Kind:
    return Kind(
        name=name,
        modules=modules,
        build=build,
        file=file,
        form=form,
        read=partial(_converted, place),
        values_are_free=values,
        bytes_are_free=data,
        names=names,
    )


_ZERO = ("checkpoint.zero.load", "checkpoint.zero.header", "checkpoint.storage.torch_pickle")
_SHARDS = {
    (1, "model"): "mp_rank_00_model_states.pt",
    (1, "optimizer"): "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    (2, "optimizer"): "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    (3, "model"): "zero_pp_rank_1_mp_rank_00_model_states.pt",
    (3, "optimizer"): "zero_pp_rank_0_mp_rank_00_optim_states.pt",
}
_WITH = [
    _kind(f"ZeRO-{stage}: {part}, manifest", _ZERO, _zero_of(stage), f"{TAG}/{file}", "torch")
    for (stage, part), file in _SHARDS.items()
]
_WITHOUT = [
    _kind(f"ZeRO-{stage}: {part}, no manifest", _ZERO, _zero_of(stage), f"{BARE}/{file}", "torch",
          place=BARE, values=_NO_CHECKSUM, data="a record without values may differ", names=(BARE,))
    for (stage, part), file in _SHARDS.items()
]  # fmt: skip
_POINTERS = [
    _kind("manifest", ("checkpoint.storage.manifest",), _zero_of(1), f"{TAG}/manifest.json",
          "json"),
    _kind("latest", ("checkpoint.zero.header", "checkpoint.open"), _zero_of(1), "latest", "text",
          place=".", values="another directory beside it may be named"),
]  # fmt: skip
_HF = ("checkpoint.hf.tensors", "checkpoint.hf.format", "checkpoint.hf.weight_files")
_TRANSFORMERS = [
    _kind("transformers: config.json", ("checkpoint.hf.architecture",), _made_by(llama),
          f"{TAG}/config.json", "json", values=_ADVICE, data=_ADVICE, names=(TAG,)),
    _kind("transformers: index", _HF, _made_by(llama), f"{TAG}/*.index.json", "json",
          names=(".safetensors",)),
    _kind("transformers: safetensors", _HF, _made_by(llama), f"{TAG}/model-00001*.safetensors",
          "bytes", data=_NO_CHECKSUM_AT_ALL),
    _kind("transformers: one file", _HF, _made_by(gpt2), f"{TAG}/model.safetensors", "bytes",
          data=_NO_CHECKSUM_AT_ALL),
    _kind("transformers: pickle", _HF, _made_by(pickled), f"{TAG}/pytorch_model.bin", "torch",
          values=_NO_CHECKSUM),
]  # fmt: skip
_UNIVERSAL = ("checkpoint.universal.reader", "checkpoint.universal.format")
_WHOLE = [
    _kind(f"universal: {file}", _UNIVERSAL, _made_by(universal, 1), f"{TAG}/{file}", "torch",
          values=_NO_CHECKSUM, data=_NO_CHECKSUM, names=(TAG,))
    for file in ("mp_rank_00_model_states.pt", "zero/optimizer_state.pt", "zero/*/fp32.pt",
                 "zero/*/exp_avg.pt", "zero/*/step.pt")
]  # fmt: skip
_DIST = ("checkpoint.megatron.dist_checkpoint", "checkpoint.megatron.dcp_metadata",
         "checkpoint.megatron.reader")  # fmt: skip
_DISTRIBUTED = [
    _kind(f"{name}: {file}", _DIST, build, f"{TAG}/{file}", form, values=_NO_CHECKSUM,
          data=_NO_CHECKSUM_AT_ALL, names=(TAG,))
    for name, build in (("torch_dist", _made_by(_stacked)), ("DCP", _made_by(_flat)))
    for file, form in ((".metadata", "bytes"), ("common.pt", "torch"), ("metadata.json", "json"),
                       ("__0_0.distcp", "bytes"))
    if name == "torch_dist" or file.endswith(("metadata", "distcp"))
]  # fmt: skip

KINDS = [*_POINTERS, *_WITH, *_WITHOUT, *_TRANSFORMERS, *_WHOLE, *_DISTRIBUTED]
