"""Layers written down in numpy, from their definition: ``from numpy_layers import numpy_layer``."""

import numpy as np


def numpy_layer(shapes, *, groups, heads, gated, normals):
    """A silent layer, by its definition: whole tensors by the end of their names."""
    layer = {}
    for tail, shape in shapes.items():
        if tail.endswith("bias") or "norm" in tail:
            layer[tail] = np.zeros(shape, np.float32)
        elif "linear_qkv" in tail:
            size = shape[0] // (heads + 2 * groups)
            eye = np.eye(heads * size, shape[1], dtype=np.float32)
            query = eye.reshape(groups, heads // groups, size, shape[1])
            key = eye[: groups * size].reshape(groups, 1, size, shape[1])
            layer[tail] = np.concatenate([query, key, key], 1).reshape(shape)
        elif "linear_fc1" in tail:
            layer[tail] = normals(tail, shape)
            for half in np.split(layer[tail], 2 if gated else 1):
                ones = min(half.shape)
                half[:ones] = np.eye(ones, shape[1], dtype=np.float32)
        else:
            layer[tail] = np.eye(*shape, dtype=np.float32)
    if gated:
        layer["mlp.linear_fc2.weight"][:] = 0
        layer["pre_mlp_layernorm.weight"][:] = 1
    return layer
