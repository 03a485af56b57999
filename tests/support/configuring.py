"""What the tests of the configuration share: a small one, and what is said of changes of it."""

import copy

import pytest
import yaml

from lag_megatron.config import parse_config
from lag_megatron.config.load import apply_override
from lag_megatron.errors import ConfigError

BASE = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 16,
    },
    "stages": [{"steps": 100}, {"steps": 300, "num_layers": 6}],
}


def tree(*overrides):
    result = copy.deepcopy(BASE)
    for override in overrides:
        apply_override(result, override)
    return result


def config(*overrides):
    return parse_config(tree(*overrides))


def problems(*overrides):
    """The lines of the error that these overrides cause, without the heading."""
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    heading, *lines = str(caught.value).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert heading == f"{count} in configuration"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def write(path, values):
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path
