"""Say what a DeepSpeed checkpoint holds and whether it is sound: exit 0 if it is, 1 if not."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint import commit
from lag_megatron.checkpoint.describe import describe, looks_like_checkpoint
from lag_megatron.checkpoint.zero import resolve
from lag_megatron.errors import CheckpointError, LagError

UNVERIFIED = "unverified: there is no manifest to compare with, so damage cannot be ruled out"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and print; 0 sound, 1 not, 2 for a user's error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a tag directory, or one that holds `latest`")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read all files, compare checksums")
    options = parser.parse_args(arguments)
    try:
        path = resolve(options.path)
        if not looks_like_checkpoint(path):
            raise CheckpointError(f"{path}: holds no checkpoint. Give a tag directory.")
    except LagError as error:
        print(error, file=sys.stderr)
        return 2
    facts, problems = _examine(path, verify=options.verify)
    facts |= {"sound": not problems, "problems": problems}
    print(json.dumps(facts, indent=1) if options.json else "\n".join(_lines(facts)))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _examine(path: Path, *, verify: bool) -> tuple[dict[str, Any], list[str]]:
    facts: dict[str, Any] = {"path": str(path)}
    problems: list[str] = []
    try:
        facts = describe(path)
    except CheckpointError as error:
        problems.append(str(error))
    if verify and commit.is_committed(path):
        try:
            problems += commit.damages(path)
        except CheckpointError as error:
            problems += [] if str(error) in problems else [str(error)]
    elif verify:
        problems.append(UNVERIFIED)
    return facts, problems


def _lines(facts: dict[str, Any]) -> list[str]:
    if "step" not in facts:
        return [facts["path"]]
    at, count = facts["topology"], facts["files"]
    lines = [
        facts["path"],
        f"  format      {facts['format']}, {at['precision']}",
        f"  ranks       {at['data_parallel']} data-parallel x "
        f"{at['tensor_parallel']} tensor-parallel",
        f"  progress    step {facts['step']}"
        + (f", {facts['tokens']:,} tokens" if facts["tokens"] is not None else ""),
        f"  model       {facts['layers']} layers, {facts['parameters']:,} parameters",
        f"  files       {len(count)}, {facts['bytes'] / 2**20:.1f} MiB",
        f"  committed   {'yes' if facts['committed'] else 'no manifest: unverified'}",
    ]
    for group in facts["optimizer"]:
        shown = ("lr", "betas", "eps", "weight_decay")
        values = " ".join(f"{k}={group[k]}" for k in shown if k in group)
        lines.append(f"  optimizer   {group['tensors']} tensors: {values}")
    for plan in facts["growth_history"]:
        settings = " ".join(f"{k}={v}" for k, v in plan["options"].items())
        lines.append(
            f"  grown       {plan['source_layers']} -> {plan['target_layers']} layers by "
            f"{plan['operator']} {settings} moments={plan['moments']} seed={plan['seed']}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
