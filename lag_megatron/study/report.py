"""The report of a study, as blocks in order."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lag_megatron.report.render.blocks import Block, Facts, Heading, Image, Table, Text
from lag_megatron.report.render.formatting import NONE, duration, integer
from lag_megatron.report.stats.run_files import Json
from lag_megatron.study.findings import finding_sentences, interval
from lag_megatron.study.plots import LABELS

_NOTES = (
    "FLOPs are those of the run's optimizer steps (forward and backward, 6 for each parameter that "
    "multiplies and token, attention besides), of the probes beyond the winner's own steps, and of "
    "the probes' evaluations. A search is charged at its growth. Validating the run itself is "
    "free for all arms alike, and so is a pool of one, which compares nothing.",
    "The last stage of each arm has as many steps as the budget leaves it: the planned cost is "
    "never above the budget and less than one such step below. Where the rule is halving, the plan "
    "takes its guard never to object; the real cost stands beside it.",
    "Seconds are added up from each step's tokens a second in metrics.jsonl and each decision's "
    "cost.seconds, without the winner's own steps: validation of the run itself, checkpoints and "
    "starts are left out, and probes that ran side by side count one after the other.",
    "Intervals are Student's, 95 %, over seeds; differences are paired by seed. They are not "
    "corrected for how many there are, and a best arm was picked after looking, which flatters it.",
    "The loss to be reached is the reference's own last one of the same seed; between validations "
    "the curve is taken as straight. Under a decaying rate a loss comes down only at the end, so "
    "no early reaching is to be expected there.",
)


def study_blocks(results: Json, pictures: Mapping[str, Path] | None) -> Iterator[Block]:
    """The report of :func:`~lag_megatron.study.results.study_results`' numbers.

    ``pictures`` is None where matplotlib is not installed.
    """
    yield Heading(1, f"{results['study']}: policies at equal FLOPs")
    for sentence in finding_sentences(results):
        yield Text(sentence)
    yield Facts(list(_facts(results)))
    yield Heading(2, "Final losses")
    yield _losses(results)
    yield Heading(2, "Costs")
    yield _costs(results)
    yield Heading(2, "Curves")
    yield from _images(results, pictures)
    yield Heading(2, "Runs")
    yield _runs(results)
    yield Heading(2, "How to read this")
    for note in _NOTES:
        yield Text(note, small=True)


def _facts(results: Json) -> Iterator[tuple[str, str]]:
    of = results["budget"]["of"]
    from_arm = "" if of is None else f", what {of} costs"
    yield "budget of each run", f"{results['budget']['flops']:.4e} FLOPs{from_arm}"
    yield "reference", results["reference"]
    yield "seeds", ", ".join(map(str, results["seeds"]))
    finished = len(results["runs"]) - len(results["missing"])
    yield "finished runs", f"{finished} of {len(results['runs'])}"


def _losses(results: Json) -> Table:
    rows = []
    for arm in results["arms"]:
        reach = arm["to_reference"] or {"flops": None, "saving": None}
        saving = reach["saving"]
        rows.append(
            (
                arm["arm"],
                arm["learning_rate"],
                integer(len(arm["seeds"])),
                _mean(arm["val_loss"]),
                NONE if arm["against_reference"] is None else interval(arm["against_reference"]),
                _scientific(reach["flops"]),
                NONE if saving is None else f"{saving['mean']:.1%}",
            )
        )
    columns = ("arm", "learning rate", ">seeds", ">final validation loss",
               f">minus {results['reference']}", ">FLOPs to its loss", ">saving")  # fmt: skip
    return Table(columns, rows)


def _costs(results: Json) -> Table:
    rows = [
        (
            arm["arm"],
            arm["learning_rate"],
            " ".join(arm["layers_run"]),
            integer(arm["steps"]),
            f"{arm['planned_flops']:.4e}",
            _scientific(arm["flops"]),
            f"{arm['planned_search_share']:.1%}",
            NONE if arm["search_share"] is None else f"{arm['search_share']:.1%}",
            _rounded(arm["tokens"]),
            _rounded(arm["all_tokens"]),
            NONE if arm["seconds"] is None else duration(arm["seconds"]),
        )
        for arm in results["arms"]
    ]
    columns = ("arm", "learning rate", "layers", ">steps", ">FLOPs planned", ">real",
               ">search planned", ">real", ">tokens", ">with probes", ">time")  # fmt: skip
    return Table(columns, rows)


def _images(results: Json, pictures: Mapping[str, Path] | None) -> Iterator[Block]:
    if pictures is None:
        yield Text("Figures need matplotlib, which is not installed: pip install '.[plot]'.")
        return
    if not pictures:
        yield Text("No run has finished yet, so there is nothing to draw.")
    bands = "; bands are 95 % intervals" if len(results["seeds"]) > 1 else ""
    for name, path in pictures.items():
        axis, _, rate = name.partition("-")
        if axis in LABELS:
            caption = f"With {rate}: mean validation loss over {LABELS[axis]}{bands}."
        else:
            caption = "Differences to the reference at the end, paired by seed."
        # The page draws pictures of the kind "scatter" over its whole width.
        yield Image(path, caption, "curves" if axis in LABELS else "scatter")


def _runs(results: Json) -> Table:
    rows, marks = [], []
    for run in results["runs"]:
        done = run["state"] == "finished"
        rows.append(
            (
                run["name"],
                "finished" if done else f"missing: {run['reason']}",
                f"{run['val_loss']:.4f}" if done else NONE,
                f"{run['flops']:.4e}" if done else NONE,
                duration(run["seconds"]) if done else NONE,
            )
        )
        marks.append("" if done else "failed")
    columns = ("run", "state", ">final validation loss", ">FLOPs", ">time")
    return Table(columns, rows, marks, folded="Every run")


def _mean(found: Json | None) -> str:
    if found is None:
        return NONE
    if found["low"] is None:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} ± {found['high'] - found['mean']:.4f}"


def _scientific(value: float | None) -> str:
    return NONE if value is None else f"{value:.4e}"


def _rounded(value: float | None) -> str:
    return NONE if value is None else integer(round(value))
