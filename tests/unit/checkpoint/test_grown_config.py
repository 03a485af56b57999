"""The configuration of a grown model of transformers: its depth, its settings for each layer."""

import pytest

from lag_megatron.checkpoint.hf.grown_config import UnknownDepthError, grown_config

ORIGINS = [0, 0, 1, 1]
TYPES = ["sliding_attention", "full_attention"]


def grow(**config):
    return grown_config(config, source_layers=2, origins=ORIGINS)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_the_depth(key):
    assert grow(**{key: 2, "hidden_size": 2}) == {key: 4, "hidden_size": 2}


def test_settings_of_each_layer_follow_their_layers():
    found = grow(num_hidden_layers=2, layer_types=TYPES, mlp_only_layers=[1], eos_token_id=[7, 8])
    assert found["layer_types"] == [TYPES[0], TYPES[0], TYPES[1], TYPES[1]]
    assert found["mlp_only_layers"] == [2, 3]
    assert found["eos_token_id"] == [7, 8]


def test_the_text_model_of_several():
    found = grow(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2})
    assert found["text_config"] == {"num_hidden_layers": 4}
    assert found["vision_config"] == {"num_hidden_layers": 2}


def test_windows_that_are_not_used_or_named_for_each_layer():
    assert grow(num_hidden_layers=2, max_window_layers=28, use_sliding_window=False)
    assert grow(num_hidden_layers=2, sliding_window_pattern=2, layer_types=TYPES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "it says no depth, the checkpoint has 2 layers"),
        ({"n_layer": 3}, "it says n_layer is 3, the checkpoint has 2 layers"),
        ({"num_layers": 2, "is_encoder_decoder": True}, "of an encoder and a decoder"),
        ({"n_layer": 2, "layer_types": ["a"]}, "its layer_types is no list of 2 entries"),
        ({"n_layer": 2, "first_k_dense_replace": 1}, "its first_k_dense_replace goes by"),
        ({"n_layer": 2, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx goes by"),
        ({"n_layer": 2, "sliding_window_pattern": 6}, "its sliding_window_pattern goes by"),
        ({"n_layer": 2, "new_layer_kinds": [1, 2]}, "its new_layer_kinds may have an entry"),
    ],
)
def test_what_is_not_known_is_not_guessed(config, message):
    with pytest.raises(UnknownDepthError, match=message):
        grow(**config)
