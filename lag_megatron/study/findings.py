"""Sentences on a study's results; a difference is claimed only where its interval excludes 0."""

from collections.abc import Iterator

from lag_megatron.report.render.formatting import plural
from lag_megatron.report.stats.run_files import Json
from lag_megatron.study.results import LAST

# Relative difference between planned and real FLOPs above which it is reported.
_NEAR = 0.01


def finding_sentences(results: Json) -> list[str]:
    """The sentences in the order of importance."""
    return [
        *_missing(results),
        *(_one_seed(results) if len(results["seeds"]) == 1 else ()),
        *_against_reference(results),
        *_own_best(results),
        *_against_last(results),
        *_faded(results),
        *_savings(results),
        *_off_budget(results),
    ]


def interval(found: Json) -> str:
    """``-0.0131 (95 %: -0.0201 to -0.0061, 3 seeds)``."""
    count = plural(found["count"], "seed")
    if found["low"] is None:
        return f"{found['mean']:+.4f} ({count}, no interval)"
    return f"{found['mean']:+.4f} (95 %: {found['low']:+.4f} to {found['high']:+.4f}, {count})"


def _missing(results: Json) -> Iterator[str]:
    if not results["missing"]:
        return
    names = "; ".join(f"{name} ({reason})" for name, reason in results["missing"].items())
    total = len(results["runs"])
    yield (
        f"{len(results['missing'])} of {total} runs are missing here: {names}. The same command "
        "goes on with them."
    )


def _one_seed(results: Json) -> Iterator[str]:
    yield (
        "There is one seed, so there are no intervals: a difference below may be chance. Take "
        "three seeds or more to find out."
    )


def _against_reference(results: Json) -> Iterator[str]:
    reference = results["reference"]
    for arm in results["arms"]:
        if arm["arm"] != reference:
            where = f"With {arm['learning_rate']}, {arm['arm']} against {reference}"
            yield _difference(where, arm["against_reference"])


def _own_best(results: Json) -> Iterator[str]:
    for row in results["own_best"]:
        where = (
            f"Each at its best learning rate, {row['arm']} ({row['learning_rate']}) against "
            f"{results['reference']} ({row['reference_learning_rate']})"
        )
        yield _difference(where, row["difference"])


def _against_last(results: Json) -> Iterator[str]:
    for row in results["best_against_last"]:
        if row["best"] == LAST:
            yield f"With {row['learning_rate']}, no arm has a lower mean loss than {LAST}."
        else:
            where = f"With {row['learning_rate']}, the best arm, {row['best']}, against {LAST}"
            yield _difference(where, row["difference"])


def _difference(where: str, found: Json | None) -> str:
    if found is None:
        return f"{where}: no seed has finished in both, so there is nothing to compare."
    text = f"{where}: the final losses differ by {interval(found)} nats"
    if found["holds_zero"] is None:
        return f"{text}; one pair cannot show a difference."
    if found["holds_zero"]:
        return f"{text}. The interval holds 0: no difference shown."
    return f"{text}. The first is {'lower' if found['mean'] < 0 else 'higher'} at equal FLOPs."


def _faded(results: Json) -> Iterator[str]:
    """Gains that one learning rate shows and another does not (Kaddour et al. 2023)."""
    by_arm: dict[str, dict[str, bool]] = {}
    for arm in results["arms"]:
        found = arm["against_reference"]
        if found is not None and found["holds_zero"] is not None:
            gained = found["mean"] < 0 and not found["holds_zero"]
            by_arm.setdefault(arm["arm"], {})[arm["learning_rate"]] = gained
    for name, gained in by_arm.items():
        shown = [rate for rate, gain in gained.items() if gain]
        others = [rate for rate, gain in gained.items() if not gain]
        if shown and others:
            yield (
                f"The gain of {name} over {results['reference']} is shown with "
                f"{', '.join(shown)}, but not with {', '.join(others)}."
            )


def _savings(results: Json) -> Iterator[str]:
    reference = results["reference"]
    for arm in results["arms"]:
        found = arm["to_reference"]
        if not found or not found["of"]:
            continue
        where = f"{arm['arm']} with {arm['learning_rate']}"
        if found["saving"] is None:
            yield (
                f"{where} comes to {reference}'s final loss in {found['reached']} of "
                f"{plural(found['of'], 'seed')}, so no saving is given."
            )
        else:
            yield (
                f"{where} comes to {reference}'s final loss after {found['flops']:.3e} FLOPs, "
                f"{found['saving']['mean']:.1%} fewer than {reference} took in all."
            )


def _off_budget(results: Json) -> Iterator[str]:
    budget = results["budget"]["flops"]
    for arm in results["arms"]:
        where = f"{arm['arm']} with {arm['learning_rate']}"
        if arm["planned_flops"] < (1 - _NEAR) * budget:
            yield (
                f"{where} was planned {1 - arm['planned_flops'] / budget:.1%} below the budget: "
                "one step is too large a part of it to come closer."
            )
        if arm["flops"] is not None and abs(arm["flops"] / arm["planned_flops"] - 1) > _NEAR:
            more = arm["flops"] / arm["planned_flops"] - 1
            yield (
                f"{where} took {abs(more):.1%} {'more' if more > 0 else 'fewer'} FLOPs than "
                "planned: compare curves at the same FLOPs, not the ends alone."
            )
    sizes = {run["vocab_size"] for run in results["runs"] if run["state"] == "finished"}
    if sizes - {results["vocab_size"]}:
        yield (
            f"The plan took a vocabulary of {results['vocab_size']:,}, the runs had "
            f"{', '.join(f'{size:,}' for size in sorted(sizes))}. Set model.vocab_size to plan "
            "exactly."
        )
