#!/usr/bin/env python3
"""Tables of the figures that have a bound, from the files under tools/bench/results.

python tools/bench/tables.py [--write]

Prints the table of docs/benchmarks.md and the README's five figures, or writes them between the
markers of these pages.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tools" / "bench" / "results"
BEGIN, END = "<!-- figures: tools/bench/tables.py -->", "<!-- end of figures -->"


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure has to reach: at least ``low``, or at most ``high``."""

    file: str
    figure: str
    low: float | None = None
    high: float | None = None

    def met(self, value: float) -> bool:
        """Whether a value is within."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}"


BOUNDS = (
    Bound("growth", "copy_ratio", low=0.7),
    Bound("growth", "finite_check_ratio", high=1.05),
    Bound("growth", "worker_anon_mb", high=64),
    Bound("growth", "read_ratio", high=1.05),
    Bound("growth", "gather_speedup", low=5),
    Bound("growth", "gather_memory_ratio", low=4),
    Bound("growth", "switch_step_ratio", high=0.10),
    Bound("growth", "switch_reload_speedup", low=15),
    Bound("probes_rules", "probe_step_ratio", high=0.42),
    Bound("probes_rules", "searches_no_worse", low=0.9),
    Bound("probes_search", "search_speedup", low=4),
    Bound("probes_search", "coordinator_share", high=0.01),
    Bound("probes_groups", "groups_throughput_ratio", low=1.2),
    Bound("loss_heads", "chunked_ce_memory_ratio", high=0.125),
    Bound("loss_heads", "chunked_ce_time_ratio", high=1.0),
    Bound("loss_heads", "mlm_head_speedup", low=5),
    Bound("optimizer", "optimizer_vs_fused", high=1.25),
    Bound("step_bf16", "cpu_bf16_vs_stock", low=1.6),
    Bound("step_bf16", "cpu_bf16_vs_best", low=0.80),
    Bound("step_fp32", "cpu_fp32_vs_best", low=0.92),
    Bound("step_bert", "bert_step_speedup", low=1.10),
    Bound("raptr", "raptr_step_ratio", high=0.60),
    Bound("gpu", "h200_bert16_mfu", low=0.45),
    Bound("gpu", "h200_bert16_vs_stock", low=1.5),
    Bound("gpu", "h200_optimizer_bandwidth_share", low=0.80),
    Bound("gpu", "h200_grow_bandwidth_share", low=0.80),
    Bound("gpu", "h200_ce_vs_megatron", low=1.5),
    Bound("convert", "convert_copy_ratio", low=0.6),
    Bound("convert", "convert_vs_ds_to_universal", low=3),
    Bound("convert", "convert_anon_mb", high=128),
    Bound("convert", "link_growth_share", high=0.01),
)


# The README's figures, and what each compares.
HEADLINES = {
    "copy_ratio": "growing a checkpoint on disk, bytes a second against copying the result "
    "(`sendfile`, fsync)",
    "switch_step_ratio": "overwriting a live engine's state with the next candidate, in training "
    "steps",
    "search_speedup": "a search of 12 candidates under one launch, times as fast as a launch for "
    "each",
    "probe_step_ratio": "steps of the default rule, of those that training every candidate to the "
    "lag takes",
    "cpu_bf16_vs_stock": "a bf16 training step, times as fast as stock Megatron-Core + DeepSpeed",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for page, text in (
        (ROOT / "docs" / "benchmarks.md", table()),
        (ROOT / "README.md", headlines()),
    ):
        if not options.write:
            print(text)
            continue
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


def headlines(results: Path = RESULTS) -> str:
    """Markdown, a row for each of the README's figures; all were measured on a CPU."""
    rows = ["| on two CPU cores | measured | bound |", "|---|--:|--:|"]
    bounds = {bound.figure: bound for bound in BOUNDS}
    for figure, meaning in HEADLINES.items():
        bound = bounds[figure]
        result = json.loads((results / f"{bound.file}.json").read_text(encoding="utf-8"))
        value = result["figures"][figure]
        missed = "" if bound.met(value) else ", **missed**"
        rows.append(f"| {meaning} | {value:.3g} | {bound}{missed} |")
    return "\n".join(rows)


def table(results: Path = RESULTS) -> str:
    """Markdown, a row for each figure.

    Figures of a GPU may not have been measured, or on another one; all others have to be there.
    """
    rows = ["| figure | measured | bound | | date | machine |", "|---|--:|--:|---|---|---|"]
    for bound in BOUNDS:
        file = results / f"{bound.file}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if _may_read(file) else None
        if result is None or (bound.file == "gpu" and bound.figure not in result["figures"]):
            rows.append(f"| `{bound.figure}` | not measured | {bound} | | | |")
            continue
        value = result["figures"][bound.figure]
        verdict = "met" if bound.met(value) else "**missed**"
        rows.append(
            f"| `{bound.figure}` | {value:.3g} | {bound} | {verdict} | {result['date']} | "
            f"{result['machine']} |"
        )
    return "\n".join(rows)


def _may_read(file: Path) -> bool:
    return file.stem != "gpu" or file.exists()


if __name__ == "__main__":
    raise SystemExit(main())
