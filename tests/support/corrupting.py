"""What is done to a checkpoint's files: to bits, pages, shards, orders and manifests."""

import json
import os
import shutil
import zipfile
from collections import OrderedDict

import torch

from lag_megatron.checkpoint.storage import manifest

MODEL = "mp_rank_00_model_states.pt"
FIRST = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
THIRD = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
MODEL3 = "zero_pp_rank_1_mp_rank_00_model_states.pt"


def storage(state, part=0.5):
    """A byte of the largest tensor of optimizer state in a shard: its record, and where it is."""

    def place(file):
        objects = torch.load(file, weights_only=False)["optimizer_state_dict"]
        if state == "fp32":
            tensor = objects["single_partition_of_fp32_groups"][0].detach()
        else:
            tensor = objects["base_optimizer_state"]["state"][0][state]
        return _find(file, tensor.numpy().tobytes(), part)

    return place


def weight(name, part=0.5):
    """A byte of a weight in a model file."""

    def place(file):
        module = torch.load(file, weights_only=False)["module"]
        return _find(file, module[name].detach().numpy().tobytes(), part)

    return place


def _find(file, content, part):
    begin = file.read_bytes().index(content)
    return begin + int(len(content) * part)


def header(file):
    """A byte of the name of an entry within the pickled objects."""
    return file.read_bytes().index(b"optimizer_state_dict") + 3


def directory(file):
    """A byte of the checksum in the zip directory's entry of the first record."""
    with zipfile.ZipFile(file) as archive:
        return archive.start_dir + 16


def flip(name, place):
    def corrupt(folder, others):
        data = bytearray((folder / name).read_bytes())
        data[place(folder / name)] ^= 16
        (folder / name).write_bytes(data)

    return corrupt


def zero_page(name):
    """Four kilobytes of a shard that read as zeros, as a lost block of a file system does."""

    def corrupt(folder, others):
        begin = storage("exp_avg", 0)(folder / name)
        data = bytearray((folder / name).read_bytes())
        page = slice(begin // 4096 * 4096 + 4096, begin // 4096 * 4096 + 8192)
        assert any(data[page])
        data[page] = bytes(4096)
        (folder / name).write_bytes(data)

    return corrupt


def cut(name, share):
    return lambda folder, others: os.truncate(
        folder / name, int((folder / name).stat().st_size * share)
    )


def remove(name):
    return lambda folder, others: (folder / name).unlink()


def take(name, other, origin=None):
    """Put a file of another checkpoint in its place."""

    def corrupt(folder, others):
        shutil.copyfile(others(other) / (origin or name), folder / name)

    return corrupt


def swap(one, other):
    def corrupt(folder, others):
        first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
        assert first != second
        (folder / one).write_bytes(second)
        (folder / other).write_bytes(first)

    return corrupt


def append(name, count):
    def corrupt(folder, others):
        with (folder / name).open("ab") as file:
            file.write(bytes(count))

    return corrupt


def edit(name, change):
    """Rewrite a file's objects, checksums and all, as a faulty program would."""

    def corrupt(folder, others):
        objects = torch.load(folder / name, weights_only=False)
        change(objects)
        torch.save(objects, folder / name)

    return corrupt


def swap_shapes(objects):
    """Two parameters of the same size that trade places in the list: a wrong order of the flat."""
    (group, *_) = objects["param_shapes"]
    names = list(group)
    one, other = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc1.weight"
    i, j = names.index(one), names.index(other)
    names[i], names[j] = names[j], names[i]
    objects["param_shapes"][0] = OrderedDict((name, group[name]) for name in names)


def three_ranks(objects):
    objects["dp_world_size"] = 3


class Evil:
    """What runs a command when a loader that trusts it reads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def evil(name):
    def corrupt(folder, others):
        objects = torch.load(folder / name, weights_only=False)
        torch.save({**objects, "extra": Evil(folder.parent / "it_ran")}, folder / name)

    return corrupt


def edit_manifest(change):
    def corrupt(folder, others):
        entries = json.loads((folder / manifest.MANIFEST).read_text())
        change(entries)
        (folder / manifest.MANIFEST).write_text(json.dumps(entries))

    return corrupt


def name_a_missing_file(entries):
    entries["files"][THIRD] = entries["files"][SHARD]


def damage_manifest(folder, others):
    os.truncate(folder / manifest.MANIFEST, 100)


def another_header(folder, others):
    """Both shards of a run on two ranks, under the model file of one on three."""
    shutil.copyfile(others("larger") / MODEL, folder / MODEL)


def larger_with_smaller_shards(folder, others):
    another_header(folder, others)
    shutil.copyfile(others("larger") / THIRD, folder / THIRD)
