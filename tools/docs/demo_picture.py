#!/usr/bin/env python3
"""The README's picture, docs/images/demo.svg: the candidates' curves in a run's report.

python tools/docs/demo_picture.py [RUN]

RUN is the directory of a finished run; by default runs/demo, which ``make demo`` writes.
"""

import argparse
from pathlib import Path

from lag_megatron.report import report_data
from lag_megatron.report.render.css import STYLE
from lag_megatron.report.sections.svg_figures import curves_figure

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "demo.svg"
_NAMESPACE = "http://www.w3.org/2000/svg"
_BACK = '<rect width="100%" height="100%" style="fill: var(--back)"/>'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    options = parser.parse_args()
    PICTURE.write_text(picture(options.run), encoding="utf-8")
    print(PICTURE)
    return 0


def picture(run_dir: Path) -> str:
    """The curves of the first growth event as an SVG file with the report's colours."""
    figure = curves_figure(report_data(run_dir)["growth"][0])
    assert figure is not None, f"{run_dir} has no evaluated candidates"
    head, _, rest = figure.svg.partition(">")
    style = "\n".join(line for line in STYLE.splitlines() if not line.startswith("figure"))
    return f'{head} xmlns="{_NAMESPACE}"><style>{style}</style>{_BACK}{rest}\n'


if __name__ == "__main__":
    raise SystemExit(main())
