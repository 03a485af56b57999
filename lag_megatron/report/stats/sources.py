"""The sources of a run's text: tokens of each, and how many of them the run was trained on."""

from lag_megatron.planning.blend import Blend
from lag_megatron.planning.cost import tokens_per_step
from lag_megatron.report.stats.run_files import Json, RunFiles


def sources_data(files: RunFiles, *, step: int) -> list[Json]:
    """The sources of a mixture after that many steps of the run; empty where there is only one.

    Candidates of growth events are not counted, except for the chosen ones' steps, which are the
    run's own.
    """
    sources = (files.run.get("data") or {}).get("sources") or []
    if not sources:
        return []
    config = files.config
    drawn = Blend([source["weight"] for source in sources]).drawn(
        step * config.parallel.global_batch
    )
    per_sample = tokens_per_step(config) // config.parallel.global_batch
    return [
        {
            "name": source["name"],
            "weight": source["weight"],
            "share": source["share"],
            "train_tokens": source["train_tokens"],
            "validation_tokens": source["validation_tokens"],
            "seen_tokens": samples * per_sample,
            "epochs": samples * per_sample / source["train_tokens"],
        }
        for source, samples in zip(sources, drawn, strict=True)
    ]
