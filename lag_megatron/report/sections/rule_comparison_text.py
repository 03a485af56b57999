"""Comparisons of rules and analyses of searches as plain text, for a terminal."""

from collections.abc import Iterator, Sequence

from lag_megatron.report.render.formatting import fixed, integer, loss
from lag_megatron.report.stats.run_files import Json


def comparison_text(comparison: Json) -> str:
    """A comparison as plain text, the rules side by side and then what each did at its rungs."""
    rules = comparison["rules"]
    head = f"{comparison['name']}, growth {comparison['growth']}: "
    lines = [f"{head}{comparison['candidates']} candidates", ""]
    lines += aligned([("", *(_title(rule) for rule in rules)), *_rows(rules)])
    for rule in rules:
        lines += ["", f"rungs of {_title(rule)}"]
        header = ("step", "candidates", "go on", "stopped", "rank correlation", "transition")
        lines += aligned([header, *(_rung_row(rung) for rung in rule["rungs"])])
    return "\n".join(lines)


def analysis_text(data: Json) -> str:
    """The table of an analysis as plain text."""
    rows = [("choice", "candidate", "final loss", "regret", "relative regret")]
    for policy, row in data["table"].items():
        row = row or dict.fromkeys(("id", "final_loss", "regret", "relative_regret"))
        losses = loss(row["final_loss"]), loss(row["regret"]), fixed(row["relative_regret"], 4)
        rows.append((policy, row["id"] or "-", *losses))
    base = f"base model, before growth: {loss(data['base_val_loss'])}"
    steps = f"steps: {' '.join(map(str, data['steps']))}"
    return "\n".join([f"{data['name']}, growth {data['growth']}", *aligned(rows), base, steps])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _title(rule: Json) -> str:
    value = rule["settings"]["rung_value"]
    return rule["rule"] if value == "last" else f"{rule['rule']} ({value})"


def _rows(rules: Sequence[Json]) -> Iterator[Sequence[str]]:
    yield "chosen", *(rule["chosen"] for rule in rules)
    yield "decides at step", *(integer(rule["lag"]) for rule in rules)
    yield "probe steps", *(integer(rule["probe_steps"]) for rule in rules)
    yield "of |G|*k", *(share_of_all(rule) for rule in rules)
    yield "failed, or not recorded that far", *(str(_failed(rule)) for rule in rules)
    yield "final loss", *(loss(rule["final_loss"]) for rule in rules)
    yield "  after step", *(integer(rule["final_step"]) for rule in rules)
    yield "regret", *(loss(rule["regret"]) for rule in rules)
    yield "relative regret", *(fixed(rule["relative_regret"], 4) for rule in rules)


def _failed(rule: Json) -> int:
    return sum(candidate["status"] == "failed" for candidate in rule["candidates"])


def share_of_all(rule: Json) -> str:
    """Probe steps as a share of training every candidate to the decision."""
    steps = rule["exhaustive_steps"]
    return f"{rule['probe_steps'] / steps:.1%} of {steps:,}" if steps else "-"


def _rung_row(rung: Json) -> Sequence[str]:
    return (
        integer(rung["rung"]),
        integer(len(rung["goes_on"]) + len(rung["stopped"])),
        integer(len(rung["goes_on"])),
        integer(len(rung["stopped"])),
        fixed(rung["rank_correlation"], 3),
        integer(rung["transition"]),
    )
