"""Sections on one growth event: early losses against final ones, and the rule's rungs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lag_megatron.report.render.blocks import Block, Heading, Image, Table, Text
from lag_megatron.report.render.formatting import NONE, fixed, integer, loss
from lag_megatron.report.sections.rule_comparison_text import share_of_all
from lag_megatron.report.stats.run_files import Json, finite

HIGH_CORRELATION, LOW_REGRET = 0.8, 0.1
CAPTIONS = {
    "curves": "Validation loss of each candidate; steps count from growth.",
    "scatter": "Each candidate's loss early and in the end; on a rising line the order lasts.",
    "correlation": "How well the loss at t predicts the final loss, over all candidates.",
    "heatmap": "Rank correlation of the losses at two steps; a red block is a phase in which the "
    "ranking lasts.",
    "regret": "What choosing the best candidate at t costs in the end: above the lowest final "
    "loss (right), and as a share of the spread of the final losses (left).",
    "recall": "Whether the best candidate in the end is among the k best at t.",
}
NAMES = {
    "oracle": "oracle: the best in the end",
    "lag@0": "LAG@0: the least disturbed",
    "last_block": "last block on top",
    "random_block": "random block on top",
    "chosen": "this run's rule",
}
MISSING = {"last_block": "not in the pool", "random_block": "not in the pool"}


def finding_blocks(growth: Json, pictures: Mapping[str, Path] | None) -> Iterator[Block]:
    """Table and figures of the analysis, where three or more candidates reached the same step."""
    analysis = growth["analysis"]
    if len(growth["candidates"]) == 1:
        return
    if analysis["table"].get("oracle"):
        yield Heading(3, "Early losses and final ones")
        yield Text(" ".join(_sentences(growth)))
        yield _table(growth)
    if pictures is None:
        yield Text("Figures need matplotlib, which is not installed: pip install '.[plot]'.")
        return
    for name, path in pictures.items():
        yield Image(path, CAPTIONS[name], name, in_html=name != "curves")


def scored_tasks(scores: Iterable[Json | None]) -> list[str]:
    """Names of the downstream tasks that any candidate has a number for."""
    numbers = (pair for one in scores for pair in (one or {}).items())
    found = (task for task, value in numbers if finite(value) is not None)
    return list(dict.fromkeys(found))


def _sentences(growth: Json) -> Iterator[str]:
    analysis = growth["analysis"]
    steps = analysis["steps"]
    ended = sum(any(s == steps[-1] for s, _ in c["curve"]) for c in growth["candidates"])
    total = len(growth["candidates"])
    if growth["exhaustive"]:
        yield f"{ended} of {total} candidates were trained {steps[-1]:,} steps, to the end."
    else:
        yield (
            f"{ended} of {total} candidates reached step {steps[-1]:,}, whose loss stands for the "
            "final one here: only with growth.exhaustive is every candidate trained to the end of "
            "the stage."
        )
    if ended < total:
        yield f"Correlations, regret and recall are over these {ended} alone."
    good = [r is not None and r <= LOW_REGRET for r in analysis["relative_regret"]]
    if (step := _lasting(steps, good)) is not None:
        yield f"From step {step:,} on, the relative regret stays within {LOW_REGRET}."
    good = [c is not None and c >= HIGH_CORRELATION for c in analysis["spearman"]]
    if (step := _lasting(steps, good)) is not None:
        yield (
            f"From step {step:,} on, the rank correlation with the final loss stays at "
            f"{HIGH_CORRELATION} or above."
        )


def _lasting(steps: Sequence[int], good: Sequence[bool]) -> int | None:
    """The first step from which on all is good; None if that is the last step alone."""
    bad = max((place for place, one in enumerate(good) if not one), default=-1)
    return steps[bad + 1] if bad + 2 < len(steps) else None


def _table(growth: Json) -> Table:
    table, base = growth["analysis"]["table"], growth["base_val_loss"]
    tasks = scored_tasks(row.get("scores") for row in table.values() if row)
    rows: list[Sequence[str]] = []
    marks = []
    for policy, row in table.items():
        name = NAMES.get(policy) or policy.upper()
        if row is None:
            missing = MISSING.get(policy, "step not evaluated")
            rows.append((name, missing, NONE, NONE, NONE, *[NONE] * len(tasks)))
        else:
            scores = row.get("scores") or {}
            ended = row["final_loss"] is not None
            id_ = row["id"] if ended else f"{row['id']} (not trained that far)"
            cells = loss(row["final_loss"]), loss(row["regret"]), fixed(row["relative_regret"], 4)
            rows.append((name, id_, *cells, *(fixed(scores.get(t), 4) for t in tasks)))
        marks.append("win" if row and row["id"] == growth["chosen"] else "")
    if base is not None:
        rows.append(("base model, before growth", NONE, loss(base), *[NONE] * (2 + len(tasks))))
        marks.append("")
    columns = ("choice", "candidate", ">final loss", ">regret", ">relative regret")
    return Table((*columns, *(f">{task}" for task in tasks)), rows, marks)


def rung_blocks(growth: Json) -> Iterator[Block]:
    """What happened at each rung, where there are any on record."""
    if not growth["rungs"]:
        return
    yield Heading(3, "Rungs")
    rows = [_rung(rung, growth) for rung in growth["rungs"]]
    columns = (">step", ">candidates", ">went on", ">stopped", ">rank correlation",
               ">transition", "verdict")  # fmt: skip
    yield Table(columns, rows)
    yield Text(
        "The rank correlation is the one between shortly before a rung, at 0.8 of it, and the "
        f"rung: below {growth['min_rank_correlation']} nobody is stopped.",
        small=True,
    )


def rule_blocks(growth: Json) -> Iterator[Block]:
    """Both rules on the same curves, where all of them are known."""
    rows = [
        (
            rule["rule"],
            rule["chosen"],
            integer(rule["lag"]),
            integer(rule["probe_steps"]),
            share_of_all(rule),
            loss(rule["final_loss"]),
            loss(rule["regret"]),
            fixed(rule["relative_regret"], 4),
        )
        for rule in growth["rules"]
    ]
    if rows:
        yield Heading(3, "The rules on these curves")
        columns = ("rule", "would choose", ">at step", ">probe steps", ">of all to there",
                   ">final loss", ">regret", ">relative regret")  # fmt: skip
        yield Table(columns, rows)


def _rung(rung: Json, growth: Json) -> Sequence[str]:
    goes_on, stopped = rung.get("goes_on") or (), rung.get("stopped") or ()
    return (
        integer(rung["rung"]),
        integer(len(goes_on) + len(stopped)),
        integer(len(goes_on)),
        integer(len(stopped)),
        fixed(rung.get("rank_correlation"), 3),
        integer(rung.get("transition")),
        _verdict(rung, growth),
    )


def _verdict(rung: Json, growth: Json) -> str:
    correlation = rung.get("rank_correlation")
    if growth["state"] == "decided" and rung is growth["rungs"][-1]:
        return f"decided: {growth['chosen']}"
    if rung.get("stopped"):
        return "the worst stopped"
    if growth["rule"] != "halving":
        return "all go on"
    if correlation is not None and correlation < growth["min_rank_correlation"]:
        return "guard: the ranking still changes, nobody is stopped"
    if correlation is None:
        return "guard: no evidence that the ranking lasts, nobody is stopped"
    return "all go on"
