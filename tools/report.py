"""Write the report of a run: report.html and report.md in its directory."""

import argparse
import json
import sys
from pathlib import Path

from lag_megatron.errors import LagError
from lag_megatron.report import report_data, write_report


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, write the report and print its path; 2 for a user's error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="e.g. runs/demo")
    parser.add_argument("--json", action="store_true", help="print the numbers, write nothing")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            print(json.dumps(report_data(options.run_dir), indent=1, allow_nan=False))
        else:
            print(write_report(options.run_dir))
    except LagError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
