"""Say what a checkpoint holds and whether it is sound: exit 0 if it is, 1 if not.

Takes DeepSpeed's ZeRO and universal checkpoints, Megatron-Core's torch_dist, torch's Distributed
Checkpoints and transformers' directories.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.inspect import inspect_checkpoint
from lag_megatron.checkpoint.open import detect, resolve_checkpoint
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.cli.command import command
from lag_megatron.cli.parser import command_parser, parse
from lag_megatron.config.schema.param_names import read_param_names
from lag_megatron.errors import printable


@command()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and print; 0 sound, 1 not, 2 for a user's error."""
    options = parse(_parser(), argv)
    path = resolve_checkpoint(options.path)
    detect(path)
    names = None if options.names is None else read_param_names(options.names)
    facts = inspect_checkpoint(path, verify=options.verify, names=names)
    problems = facts["problems"]
    print(json.dumps(facts, indent=1) if options.json else printable("\n".join(_lines(facts))))
    for problem in problems:
        print(printable(problem), file=sys.stderr)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "PATH",
        "lag-inspect runs/demo/stage01",
        "lag-inspect ckpt/global_step2000 --verify --json",
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a folder that points to one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read all files, compare checksums")
    parser.add_argument("--names", type=Path, metavar="FILE", help="YAML: which list of modules "
        "holds the layers, and roles of parameters (docs/checkpoints.md)")  # fmt: skip
    return parser


def _lines(facts: dict[str, Any]) -> list[str]:
    if "format" not in facts:
        return [facts["path"]]
    at = facts["topology"]
    ranks = [
        f"{at[axis]} {axis.replace('_', '-')}"
        for axis in ("data_parallel", "tensor_parallel", "pipeline_parallel")
        if at.get(axis) is not None
    ]
    progress = [f"step {facts['step']}"] if facts["step"] is not None else []
    progress += [f"{facts['tokens']:,} tokens"] if facts["tokens"] is not None else []
    model = [_layers(facts)] if facts["layers"] is not None or facts["layer_stacks"] else []
    model += [f"{facts['parameters']:,} parameters"] if facts["parameters"] is not None else []
    marker = facts["marker"]
    by = "manifest" if marker == manifest.MANIFEST else marker
    committed = "yes" if facts["committed"] else f"no {by}: unverified"
    lines = [
        facts["path"],
        f"  format      {', '.join(filter(None, (facts['format'], at['precision'])))}",
        f"  ranks       {' x '.join(ranks) or 'not recorded'}",
        f"  progress    {', '.join(progress) or 'not recorded'}",
        f"  model       {', '.join(model) or 'not known'}",
        f"  files       {len(facts['files'])}, {facts['bytes'] / 2**20:.1f} MiB",
        f"  committed   {committed if marker else 'not recorded'}",
        f"  states      {' '.join(facts['optimizer_states']) or 'none'}",
    ]
    lines += map(_group_line, facts["optimizer"])
    lines += [f"  note        {note}" for note in facts["notes"]]
    return lines + [_growth_line(plan) for plan in facts["growth_history"]]


def _layers(facts: dict[str, Any]) -> str:
    stacks = facts["layer_stacks"]
    if len(stacks) > 1:
        listed = " or ".join(f"{stack['layers']} ({stack['name']})" for stack in stacks)
        return f"layers: {listed}; --names says which to grow"
    names = [f" ({stack['name']})" for stack in stacks]
    return f"{facts['layers']} layers{''.join(names)}"


def _group_line(group: dict[str, Any]) -> str:
    shown = ("lr", "betas", "eps", "weight_decay")
    values = " ".join(f"{k}={group[k]}" for k in shown if k in group)
    count = "group" if group["tensors"] is None else f"{group['tensors']} tensors"
    return f"  optimizer   {count}: {values}"


def _growth_line(plan: dict[str, Any]) -> str:
    settings = {**plan.get("options", {}), **{k: plan.get(k) for k in ("moments", "seed")}}
    return (
        f"  grown       {plan.get('source_layers')} -> {plan.get('target_layers')} layers by "
        f"{plan.get('operator')} {' '.join(f'{k}={v}' for k, v in settings.items())}"
    )


if __name__ == "__main__":
    sys.exit(main())
