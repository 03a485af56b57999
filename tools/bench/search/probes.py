#!/usr/bin/env python3
"""What a search costs: probe steps of the rule, wall time, probe groups, the coordinator.

python tools/bench/search/probes.py [--json FILE] [--only rules search groups] [--naive N]
                                    [--searches FOLDER] [--scratch FOLDER] [--smoke]

`rules` replays recorded searches; `search` runs one against a loop that launches each candidate;
`groups` probes on 4 ranks as one group and as four.  Both sides of each comparison run in one call:
about ten minutes on two cores, and 3 GB of disk.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from tools.bench.common.figures import write_figures
from tools.bench.search.group_throughput import group_figures
from tools.bench.search.naive_search import SMOKE, Sizes, search_figures
from tools.bench.search.recorded_rules import rules_figures

PARTS = ("rules", "search", "groups")
SEARCHES = Path(__file__).resolve().parents[1] / "searches"
BOUNDS = {
    "probe_step_ratio": "<= 0.42",
    "searches_no_worse": ">= 0.9",
    "search_speedup": ">= 4",
    "groups_throughput_ratio": ">= 1.2",
    "coordinator_share": "<= 0.01",
}


def main() -> int:
    options = _parser().parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        for part in options.only:
            print(f"== {part} ==", flush=True)
            if part == "rules":
                figures |= rules_figures(options.searches)
            elif part == "search":
                sizes = SMOKE if options.smoke else Sizes()
                figures |= search_figures(scratch, sizes, naive=options.naive)
            else:
                figures |= group_figures(scratch, smoke=options.smoke)
            print(flush=True)
    for figure, value in figures.items():
        print(f"{figure:<32} {value:12.4f}   {BOUNDS.get(figure, '')}")
    if options.json:
        write_figures(options.json, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--searches", type=Path, default=SEARCHES, metavar="FOLDER")
    parser.add_argument(
        "--naive", type=int, default=3, metavar="N", help="candidates of the naive loop to measure"
    )
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="on the disk to be measured")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
