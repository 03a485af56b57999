"""Whole tensors from DeepSpeed's shard files, written down a second time and simply.

Files are read with DeepSpeed's own classes; nothing of the library's own readers is used, so that a
mistake there cannot hide itself.
"""

import math
import re

import torch

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def read_full(folder, *, stage, data_size, tensor_size, precision, gated=False):
    """{(state, name): whole tensor} and the set of step counters of a tag folder."""
    whole, steps = {}, set()
    parts = []
    for tensor_rank in range(tensor_size):
        state, counts = _of_tensor_rank(folder, stage, data_size, tensor_rank, precision)
        parts.append(state)
        steps |= counts
    for state, name in parts[0]:
        whole[state, name] = _join(name, [part[state, name] for part in parts], gated)
    return whole, steps


def _of_tensor_rank(folder, stage, data_size, tensor_rank, precision):
    def load(name):
        return torch.load(folder / name, weights_only=False, map_location="cpu")

    mp = f"mp_rank_{tensor_rank:02d}"
    prefix = "bf16_" if precision == "bf16" else ""
    if stage == 0:
        return _stage0(load(f"{mp}_model_states.pt"), precision)
    shards = [
        load(f"{prefix}zero_pp_rank_{r}_{mp}_optim_states.pt")["optimizer_state_dict"]
        for r in range(data_size)
    ]
    if stage == 3:
        shapes = load(f"zero_pp_rank_0_{mp}_model_states.pt")["param_shapes"]
        return _stage3(shapes, shards)
    model = load(f"{mp}_model_states.pt")
    state, steps = _stage12(model["param_shapes"], shards)
    for group in model["param_shapes"]:
        for name in group:
            state["weight", name] = model["module"][name]
    return state, steps


def _stage0(model, precision):
    module = {n: t for n, t in model["module"].items() if torch.is_tensor(t)}
    names = [n for n, t in module.items() if t.dim() > 1]
    names += [n for n, t in module.items() if t.dim() == 1]
    optimizer = model["optimizer"]
    masters = [module[n] for n in names]
    if precision != "fp32":
        masters = [t for group in optimizer["fp32_groups"] for t in group]
        optimizer = optimizer["optimizer_state_dict"]
    state = {}
    for i, name in enumerate(names):
        state["weight", name] = module[name]
        state["fp32", name] = masters[i]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment, name] = optimizer["state"][i][moment].view(module[name].shape)
    assert set(optimizer["state"]) == set(range(len(names)))
    return state, {float(s["step"]) for s in optimizer["state"].values()}


def _stage12(shapes, shards):
    state, steps = {}, set()
    for number, group in enumerate(shapes):
        flat = {"fp32": [s["single_partition_of_fp32_groups"][number] for s in shards]}
        inner = [s["base_optimizer_state"]["state"][number] for s in shards]
        flat |= {m: [entry[m] for entry in inner] for m in ("exp_avg", "exp_avg_sq")}
        steps |= {float(entry["step"]) for entry in inner}
        for kind, pieces in flat.items():
            joined, at = torch.cat(pieces), 0
            for name, shape in group.items():
                state[kind, name] = joined[at : at + math.prod(shape)].view(shape)
                at += math.prod(shape)
    return state, steps


def _stage3(shapes, shards):
    state, steps = {}, set()
    for number, group in enumerate(shapes):
        flat = {"fp32": [s["fp32_flat_groups"][number] for s in shards]}
        inner = [s["optimizer_state_dict"]["state"][number] for s in shards]
        flat |= {m: [entry[m] for entry in inner] for m in ("exp_avg", "exp_avg_sq")}
        steps |= {float(entry["step"]) for entry in inner}
        for kind, pieces in flat.items():
            at = 0
            for name, shape in group.items():
                slot = math.ceil(math.prod(shape) / len(shards))
                joined = torch.cat([piece[at : at + slot] for piece in pieces])
                state[kind, name] = joined[: math.prod(shape)].view(shape)
                at += slot
            assert all(len(piece) == at for piece in pieces)
    return state, steps


def _join(name, parts, gated):
    if len(parts) == 1:
        return parts[0]
    if re.search(r"(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)$", name):
        if gated and "linear_fc1" in name:
            gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([*gates, *ups])
        return torch.cat(parts)
    if re.search(r"(linear_proj|linear_fc2)\.weight$", name):
        return torch.cat(parts, 1)
    assert all(torch.equal(part, parts[0]) for part in parts), name
    return parts[0]


def grow_full(state, layers, *, moments="copy", fresh=None):
    """Whole tensors of the grown model.

    Args:
        state: as ``read_full`` returns it.
        layers: (old layer, is new) for each layer of the grown model.
        moments: of new layers: copy, zero or borrow.
        fresh: name and shape to new weights; None duplicates.
    """
    grown = {key: value for key, value in state.items() if ".layers." not in key[1]}
    for layer, (old, is_new) in enumerate(layers):
        for (kind, name), value in state.items():
            if f".layers.{old}." not in name:
                continue
            new_name = name.replace(f".layers.{old}.", f".layers.{layer}.")
            if is_new and fresh is not None and kind in ("fp32", "weight"):
                value = fresh(new_name, tuple(value.shape)).to(value.dtype)
            elif (is_new and kind == "exp_avg" and moments != "copy") or (
                is_new and kind == "exp_avg_sq" and moments == "zero"
            ):
                value = torch.zeros_like(value)
            grown[kind, new_name] = value
    return grown


def differences(found, expected):
    """Names of the tensors that are not the same bit for bit."""
    keys = set(found) ^ set(expected)
    return sorted(keys) + sorted(
        key for key in set(found) & set(expected) if not torch.equal(found[key], expected[key])
    )


def tree_differences(one, other, at=""):
    """Paths at which two trees of objects of checkpoint files differ."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [at]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{at}/{key}" for key in set(one) ^ set(other)]
        for key in set(one) & set(other):
            found += tree_differences(one[key], other[key], f"{at}/{key}")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{at} has {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in tree_differences(a, b, f"{at}/{i}")]
    if hasattr(one, "__dict__") and type(one) is type(other):
        return tree_differences(vars(one), vars(other), at)
    return [] if type(one) is type(other) and one == other else [f"{at}: {one!r}, {other!r}"]
