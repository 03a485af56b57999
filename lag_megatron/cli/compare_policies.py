"""Compare growth policies at equal FLOPs: every arm, learning rate and seed of a study file.

The same command goes on after any interruption; finished runs are not repeated.  Exits 0 when all
runs have finished, 1 when some failed, 2 for a user's error.
"""

import argparse
import sys
from pathlib import Path

from lag_megatron.cli import train
from lag_megatron.cli.command import command
from lag_megatron.cli.lock_option import add_lock_option
from lag_megatron.cli.parser import add_list_configs, command_parser, parse
from lag_megatron.config.installed import checkout, find_config
from lag_megatron.config.schema.ranges import MAX_WORKERS, require_whole
from lag_megatron.errors import RunError
from lag_megatron.study import (
    StudyFolder,
    StudyPlan,
    launch_runs,
    load_study,
    plan_study,
    plan_text,
    prepare_study,
    write_study,
)
from lag_megatron.targets.file_lock import sole_writer


@command(interrupted="The same command goes on from here.")
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run the study.

    Returns 0 when all runs have finished, 1 when some failed, 2 for a user's error, and 128 + N
    after the signal N.
    """
    options = parse(_parser(), argv)
    return _compare(options, script=_training_program())


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "STUDY",
        "lag-compare-policies studies/raptr_bert_small --dry-run",
        "lag-compare-policies study.yaml --workers 2",
    )
    parser.add_argument(
        "study", metavar="STUDY", help="YAML file, or the name of one that comes with the package"
    )
    add_list_configs(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/studies/<study>")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time")
    add_lock_option(parser)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the plan and its costs")
    only.add_argument("--report-only", action="store_true", help="report what is there")
    return parser


def _training_program() -> Path:
    """What launchers start on each rank: a checkout's program, or a wheel's module as a file."""
    root = checkout()
    return Path(train.__file__) if root is None else root / "launch" / "train.py"


def _compare(options: argparse.Namespace, *, script: Path) -> int:
    require_whole(options.workers, "--workers", error=RunError, least=1, most=MAX_WORKERS)
    plan = plan_study(load_study(find_config(options.study)))
    out = options.out or Path("runs") / "studies" / plan.study.name
    folder = StudyFolder(out.resolve())
    if options.report_only:
        if not folder.root.is_dir():
            raise RunError(
                f"{folder.root}: nothing there to report. Run the study first, or give --out."
            )
        _report(plan, folder, lock=options.lock)
        return 0
    _say(plan_text(plan, folder))
    if options.dry_run:
        return 0
    with sole_writer(folder.root / "study", lock=options.lock):
        return _run(plan, folder, options, script=script)


def _report(plan: StudyPlan, folder: StudyFolder, *, lock: bool) -> None:
    with sole_writer(folder.root / "report", lock=lock):
        _say(f"report: {write_study(plan, folder)}")


def _run(plan: StudyPlan, folder: StudyFolder, options: argparse.Namespace, *, script: Path) -> int:
    left = prepare_study(plan, folder, workers=options.workers)
    ended = launch_runs(
        left,
        folder,
        script=script,
        launcher=plan.study.config.launcher,
        workers=options.workers,
        say=_say,
    )
    if ended.signal is not None:
        _say("stopped; the same command goes on from here, --report-only reports what is there")
        return 128 + ended.signal
    _report(plan, folder, lock=options.lock)
    for failure in ended.failures:
        print(f"failed: {failure.run.name}", file=sys.stderr)
    return 1 if ended.failures else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
