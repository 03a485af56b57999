"""The report of a run, and other rules on its curves.

Without options: write report.html, report.md and figures/*.png into the run directory, with
--output elsewhere.
"""

import argparse
import json
import sys
from pathlib import Path

from lag_megatron.cli.command import command
from lag_megatron.cli.lock_option import add_lock_option
from lag_megatron.cli.parser import command_parser, parse
from lag_megatron.errors import LagError, RunError
from lag_megatron.report import report_data, report_file, write_report, write_search
from lag_megatron.report.sections.rule_comparison_text import analysis_text, comparison_text
from lag_megatron.report.stats.recorded_search import read_search, recorded_searches
from lag_megatron.report.stats.rule_comparison import RULES, compare_rules, search_data
from lag_megatron.targets.file_lock import sole_writer
from lag_megatron.targets.overlap import require_apart
from lag_megatron.targets.writable import require_writable


@command()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and do what it says; 2 for a user's error."""
    options = parse(_parser(), argv)
    print(_answer(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __doc__,
        "RUN",
        "lag-report runs/demo",
        "lag-report runs/demo --rule halving --rule lag --set growth.lag=20",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="e.g. runs/demo, or a recorded search (.json[.gz])"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers, write nothing")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR|FILE",
        help="write the report there: a folder, or a page.html",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        choices=RULES,
        help="what this rule would have chosen on the recorded curves; repeats, to compare",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="growth.KEY=VALUE",
        help="with another setting, e.g. growth.lag=20 or 'growth.rungs=[5, 10, 20]'",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the curves as a recorded search"
    )
    parser.add_argument(
        "--growth", type=int, metavar="N", help="only this growth event (--record: the last)"
    )
    add_lock_option(parser)
    return parser


def _require_recorded(file: Path, run: Path) -> None:
    """Refuse to write over a file with anything but an earlier recorded search.

    Raises:
        RunError: if it holds something else or is what is read.
    """
    if run.is_file():
        require_apart(file, run, error=RunError)
    require_writable(file, "--record", error=RunError)
    try:
        if file.exists():
            read_search(file)
    except LagError:
        raise RunError(
            f"--record {file}: is there already and holds no recorded search, so it is left "
            "alone. Name another file."
        ) from None


def _answer(options: argparse.Namespace) -> str:
    run: Path = options.run
    compared = options.rule or options.set
    if options.output and (compared or options.json or options.record or run.is_file()):
        raise RunError(
            f"--output {options.output}: for the report of a run directory, which --json, --rule, "
            "--set, --record and recorded searches do not write. Leave it out."
        )
    if not compared and not options.record and run.is_dir():
        if options.json:
            return json.dumps(report_data(run), indent=1, allow_nan=False)
        page = report_file(run, options.output)
        with sole_writer(page.with_suffix(""), lock=options.lock):
            return str(write_report(run, options.output))
    if options.record:
        _require_recorded(options.record, run)
        growth = options.growth or max((s.growth for s in recorded_searches(run)), default=1)
        there = options.record.parent.is_dir()  # else nothing can be written, which is said below
        with sole_writer(options.record, lock=options.lock and there):
            write_search(run, growth, options.record)
        return str(options.record)
    searches = recorded_searches(run) if run.is_dir() else [read_search(run)]
    searches = [s for s in searches if options.growth in (None, s.growth)]
    if not searches:
        raise RunError(f"{run}: nothing was grown there, so there are no curves to judge by.")
    if not compared:
        data = [search_data(search) for search in searches]
        return json.dumps(data[0], indent=1) if options.json else analysis_text(data[0])
    found = [compare_rules(search, options.rule, options.set) for search in searches]
    if options.json:
        return json.dumps({"name": found[0]["name"], "growth": found}, indent=1, allow_nan=False)
    return "\n\n".join(map(comparison_text, found))


if __name__ == "__main__":
    sys.exit(main())
