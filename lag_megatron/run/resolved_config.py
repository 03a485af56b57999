"""The configuration of a run with what its journal says about its stages."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lag_megatron.config import RunConfig
from lag_megatron.planning.random_paths import with_path_length


def as_journalled(config: RunConfig, events: Iterable[Mapping[str, Any]]) -> RunConfig:
    """``config`` with what the journal records about the stages.

    A stage that a measured slope ended has the length that it had then.  A stage that starts from a
    candidate with paths has these paths.

    Args:
        config: as the run was asked for.
        events: all lines of the journal.
    """
    for event in events:
        if event["event"] == "stage_cut":
            stages = list(config.stages)
            stages[event["stage"]] = replace(stages[event["stage"]], steps=event["steps"])
            config = replace(config, stages=tuple(stages))
        elif event["event"] == "decision" and "path_length" in event:
            length = event["path_length"]
            length = tuple(length) if isinstance(length, list) else length
            config = with_path_length(config, event["growth"], length)
    return config
