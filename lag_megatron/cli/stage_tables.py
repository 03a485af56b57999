"""Tables of ``plan_stages`` for a terminal."""

from typing import Any


def plan_lines(data: dict[str, Any]) -> list[str]:
    """A plan, as ``plan_data`` gives it."""
    stages, per_step = data["stages"], data["tokens_per_step"]
    head = ["layers", "hidden", "parameters", "grown in", "rho", "enters at", "ends at", "slope",
            "steps", "compute", "rate"]  # fmt: skip
    rows = [
        [
            f"{row['num_layers']}", f"{row['hidden_size']}", f"{row['parameters']:,}",
            row["growth"] or "-", "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
            f"{row['enters_at_step']:,}", f"{row['ends_at_step']:,}", f"{row['until_slope']:.4f}",
            f"{row['steps']:,}", f"{row['compute']:.3g}", f"{row['learning_rate']:.3g}",
        ]
        for row in stages
    ]  # fmt: skip
    if per_step is not None:
        head.append("tokens")
        for cells, row in zip(rows, stages, strict=True):
            cells.append(f"{row['tokens']:,}")
    scratch = data["scratch"]
    low, high = (pick(row["critical_batch_tokens"] for row in stages) for pick in (min, max))
    by = "the law and the measured rho" if data["measured_ratios"] else "the law"
    yours = "" if per_step is None else f"; yours is {per_step:,}"
    lines = [
        *_table(head, rows),
        "",
        f"All stages: {data['compute']:.3g} FLOPs. The last size from scratch: "
        f"{scratch['steps']:,} steps, {scratch['compute']:.3g} FLOPs.",
        f"Saving: {data['saving']:.1%} of the compute, by {by}.",
        f"The steps are those of the critical batch size, {low:,.0f} to {high:,.0f} tokens at the "
        f"stages' ends{yours}.",
    ]
    if not data["defaults"]:
        lines.append("The default thresholds are those of the default constants: see 'best'.")
    if data["yaml"] is None:
        return [*lines, data["note"]]
    slopes = ", ".join(f"{row['until_slope']:.4g}" for row in stages)
    return [*lines, f"With measured slopes instead: until_slope {slopes}.", "", data["yaml"]]


def published_lines(data: dict[str, Any]) -> list[str]:
    """Published figures, as ``published_data`` gives them."""
    head = ["growth", "small", "large", "slope", "grows at", "enters at", "ends at", "rho",
            "saving"]  # fmt: skip
    rows = [
        [
            row["growth"], row["small"], row["large"], f"{row['until_slope']:.4f}",
            f"{row['grows_at_step']:,}", f"{row['enters_at_step']:,}", f"{row['ends_at_step']:,}",
            f"{row['ratio']:.3f}", f"{row['saving']:.1%}",
        ]
        for row in data["growths"]
    ]  # fmt: skip
    figures = [
        [row["name"], f"{row['published']:.6g}", f"{row['law']:.6g}",
         " ".join(filter(None, (row["verdict"], row["note"] and f"({row['note']})")))]
        for row in data["checks"]
    ]  # fmt: skip
    return [
        *_table(head, rows),
        "",
        *_table(["published figure", "published", "law", ""], figures, left=(0, 3)),
        "",
        data["note"],
    ]


def _table(head: list[str], rows: list[list[str]], *, left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
