"""Alter every kind of file that is read for as long as asked: ``make fuzz SECONDS=600``.

Prints a table and the smallest input of each break; exit code 1 where something broke.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support"), str(HERE.parents[1])]

from kinds import KINDS  # noqa: E402
from trials import Folders, Trials, try_kind  # noqa: E402

_ROUND = 20


def main() -> int:
    """Parse the command line, go round all kinds, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kind", default="", help="only kinds whose name has this in it")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.kind in kind.name]
    results = {kind.name: Trials() for kind in kinds}
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        folders = Folders(Path(root))
        while time.monotonic() < end:
            for kind in kinds:
                example = folders.example(kind)
                try_kind(example, results[kind.name], count=_ROUND, seed_=random.getrandbits(64))
                if time.monotonic() > end:
                    break
    print(table(results))
    return 1 if any(trials.breaks for trials in results.values()) else 0


def table(results: dict[str, Trials]) -> str:
    """Kind, inputs, refused, same, free, broken; then the breaks."""
    lines = [f"{'kind':44} {'inputs':>7} {'refused':>7} {'same':>7} {'free':>7} {'broken':>7}"]
    for name, trials in results.items():
        counts = trials.counts
        row = (sum(counts.values()), *(counts[k] for k in ("refused", "same", "free", "broken")))
        lines.append(f"{name:44} " + " ".join(f"{n:>7}" for n in row))
    for name, trials in results.items():
        for cause, (about, said) in sorted(trials.breaks.items()):
            lines += [f"{name}: {cause}", f"    input: {about}", f"    {said}"]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
