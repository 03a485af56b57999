"""Where layers are found: lists of any name, lists in layers, several lists."""

import pytest

from lag_megatron.checkpoint.families.describe_layers import describe_layers
from lag_megatron.checkpoint.families.layer_stack import (
    LayerName,
    count_layers,
    find_layer_stack,
    layer_stacks,
)
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import PlanError


def layers(head, count, *, size=100, tails=("w.weight",)):
    return {f"{head}{i}.{tail}": (size,) for i in range(count) for tail in tails}


@pytest.mark.parametrize(
    "head",
    [
        "transformer.h.",
        "h.",
        "bert.encoder.layer.",
        "model.layers.",
        "encoder.block.",
        "blocks.",
        "visual.transformer.resblocks.",
        "anything.at_all.",
        "",
    ],
)
def test_a_list_of_any_name(head):
    shapes = {"embed.weight": (10_000,), **layers(head, 12)}
    stack = find_layer_stack(shapes)
    assert (stack.head, stack.numbers) == (head, tuple(range(12)))
    assert stack.match(f"{head}11.w.weight") == LayerName(11, "w.weight")
    assert stack.name(3, "w.weight") == f"{head}3.w.weight"
    for name in ("embed.weight", f"{head}weight", f"x.{head}0.w.weight", f"{head}0"):
        assert stack.match(name) is None
    assert describe_layers(shapes) == {
        "layers": 12,
        "layer_stacks": [{"name": f"{head}N", "layers": 12}],
    }


def test_lists_inside_a_layer_are_part_of_it():
    tails = ("norm.weight", *(f"experts.{i}.w.weight" for i in range(8)), "mlp.layers.0.weight")
    stack = find_layer_stack(layers("layers.", 4, tails=tails))
    assert (stack.head, stack.numbers) == ("layers.", (0, 1, 2, 3))
    assert stack.match("layers.3.experts.0.w.weight") == LayerName(3, "experts.0.w.weight")


def test_without_a_list_there_are_no_layers():
    shapes = {"embed.weight": (8, 4), "head.bias": (8,), "gains.0": (8,)}
    assert find_layer_stack(shapes) is None
    assert count_layers(shapes) == 0
    assert describe_layers(shapes) == {"layers": 0, "layer_stacks": []}


def test_two_stacks_of_comparable_size_are_refused():
    shapes = layers("encoder.block.", 4) | layers("decoder.block.", 6)
    message = (
        r"2 stacks .*decoder\.block\.N with 6, encoder\.block\.N with 4.*"
        r'layers: "decoder\.block\.\{\}"'
    )
    with pytest.raises(PlanError, match=message):
        find_layer_stack(shapes)
    names = ParamNames(layers="encoder.block.{}")
    assert find_layer_stack(shapes, names).numbers == (0, 1, 2, 3)
    assert describe_layers(shapes) == {
        "layers": None,
        "layer_stacks": [
            {"name": "decoder.block.N", "layers": 6},
            {"name": "encoder.block.N", "layers": 4},
        ],
    }
    expected = {"layers": 4, "layer_stacks": [{"name": "encoder.block.N", "layers": 4}]}
    assert describe_layers(shapes, names) == expected
    assert count_layers(shapes) == 6


@pytest.mark.parametrize(("small", "count"), [(24, 1), (25, 2)])
def test_a_quarter_of_the_parameters_is_comparable(small, count):
    shapes = layers("decoder.layers.", 10, size=100) | layers("mtp.", 10, size=small)
    assert len(layer_stacks(shapes)) == count


def test_the_users_list_may_lie_inside_another():
    """``nn.Sequential(embedding, encoder, head)`` is a numbered list, of unlike modules."""
    shapes = {"0.weight": (50,), **layers("1.layers.", 3), "2.weight": (50,)}
    assert find_layer_stack(shapes).head == ""
    stack = find_layer_stack(shapes, ParamNames(layers="1.layers.{}"))
    assert stack.match("1.layers.2.w.weight") == LayerName(2, "w.weight")


def test_a_users_list_without_parameters():
    with pytest.raises(PlanError, match=r'"h\.\{\}" .* matches no parameter.*model\.layers\.\{\}'):
        find_layer_stack(layers("model.layers.", 2), ParamNames(layers="h.{}"))
