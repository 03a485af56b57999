"""What the tests of layer maps and plans share: every map of LAG's space up to a depth."""

from lag_megatron.growth.operators.layer_map import (
    feasible_block_sizes,
    feasible_indices,
    lag_layer_map,
)

MAX_DEPTH = 8
EVERY_LAG = [
    (source, target, index, block_size)
    for source in range(1, MAX_DEPTH + 1)
    for target in range(source + 1, 2 * source + 1)
    for index in feasible_indices(source, target)
    for block_size in feasible_block_sizes(source, target)
]


def lag_map(source, target, index, block_size, init="duplicate"):
    return lag_layer_map(source, target, index=index, block_size=block_size, init=init)
