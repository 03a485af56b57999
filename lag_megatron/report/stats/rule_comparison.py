"""Rules replayed on a recorded search: what each would have chosen, at what cost."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lag_megatron.config import GrowthConfig, parse_config
from lag_megatron.config.load import apply_override
from lag_megatron.errors import RunError
from lag_megatron.report.formatting import fixed, integer, loss
from lag_megatron.report.stats.analysis import analysis_of
from lag_megatron.report.stats.recorded_search import Search
from lag_megatron.report.stats.run_files import Json, finite
from lag_megatron.selection import Evaluation, Replay, replay
from lag_megatron.selection.analysis import ended_curves
from lag_megatron.selection.ranking import Curve

RULES = ("lag", "halving")
NOMINAL_MODEL = {
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 1,
    "num_query_groups": 1,
    "seq_length": 64,
}
SETTINGS = ("lag", "rungs", "eta", "rung_value", "min_rank_correlation")


def compare_rules(search: Search, rules: Sequence[str] = (), settings: Sequence[str] = ()) -> Json:
    """What each rule would have done with the search, one entry of ``rules`` each.

    Args:
        search: the recorded curves.
        rules: names; without any the search's own.
        settings: ``key=value`` over the search's settings, ``growth.key=value`` too.  With a new
            lag and no new rungs, the rungs from it on are replaced by it.

    Raises:
        ConfigError: if a setting does not hold.
        RunError: if a rule needs an evaluation that was not recorded, or nobody would be left.
    """
    names = rules or [str(search.config.get("rule", GrowthConfig().rule))]
    return {
        "name": search.name,
        "growth": search.growth,
        "candidates": len(search.pool),
        "rules": [_outcome(search, settings_of(search, name, settings)) for name in names],
    }


def own_outcome(search: Search, rule: str | None = None) -> Json | None:
    """What a rule does with the search's own settings; None where the recording falls short.

    Without a name, the search's own rule.
    """
    try:
        found: Json = compare_rules(search, [rule] if rule else ())["rules"][0]
    except RunError:
        return None
    return found


def search_data(search: Search) -> Json:
    """The analysis of a recorded search, with what its own rule does under ``rules``."""
    own = own_outcome(search)
    lag = own["lag"] if own else settings_of(search, None, ()).last_rung
    failed = {c["id"] for c in (own or {}).get("candidates", ()) if c["status"] == "failed"}
    analysis = analysis_of(
        search.pool,
        {id_: curve for id_, curve in loss_curves(search).items() if id_ not in failed},
        lag=lag,
        base_val_loss=search.base_val_loss,
        chosen=own["chosen"] if own else None,
        scores={},
    )
    rules = [own] if own else []
    return {"name": search.name, "growth": search.growth, **analysis, "rules": rules}


def loss_curves(search: Search) -> dict[str, Curve]:
    """Step after growth and finite validation loss of each candidate, in the pool's order."""
    return {
        c["id"]: [
            (row["step"], value)
            for row in search.curves[c["id"]]
            if (value := finite(row["val_loss"])) is not None
        ]
        for c in search.pool
    }


def settings_of(search: Search, rule: str | None, settings: Sequence[str]) -> GrowthConfig:
    """The search's settings with another rule and other values, checked.

    Raises:
        ConfigError: with every problem found.
    """
    growth = {**search.config, "exhaustive": True}  # nothing limits where it was evaluated
    tree: Json = {"growth": growth}
    if rule is not None:
        growth["rule"] = rule
    for setting in settings:
        apply_override(tree, setting if setting.startswith("growth.") else f"growth.{setting}")
    changed = {setting.removeprefix("growth.").partition("=")[0] for setting in settings}
    lag, rungs = growth.get("lag"), growth.get("rungs")
    if "lag" in changed and "rungs" not in changed and rungs and isinstance(lag, int):
        growth["rungs"] = [*(rung for rung in rungs if rung < lag), lag]
    # A complete configuration for the checks; replay says where the recording is too short.
    tree["stages"] = [{"steps": 1}, {"steps": sys.maxsize, "num_layers": 2}]
    tree["model"] = NOMINAL_MODEL
    return parse_config(tree, source=f"the rule on {search.name}").growth_before(1)


def _outcome(search: Search, settings: GrowthConfig) -> Json:
    pool = [candidate["id"] for candidate in search.pool]
    curves = {id_: [Evaluation.of_row(row) for row in search.curves[id_]] for id_ in pool}
    try:
        done = replay(settings, curves, pool=pool)
    except RunError as error:
        raise RunError(f"{search.name}, growth {search.growth}: {error}") from None
    values = asdict(settings) | {
        "rung_value": settings.compared_by,
        "min_rank_correlation": settings.rank_bar,
    }
    return {
        "rule": settings.rule,
        "settings": {key: values[key] for key in SETTINGS},
        "chosen": done.chosen,
        "lag": done.lag,
        "probe_steps": done.probe_steps,
        "exhaustive_steps": len(pool) * done.lag,
        **_price(search, done),
        "rungs": [verdict.describe() for verdict in done.verdicts],
        "candidates": [
            {
                "id": id_,
                "status": done.status[id_],
                "steps": done.steps[id_],
                "reason": done.reasons[id_],
            }
            for id_ in pool
        ],
    }


def _price(search: Search, done: Replay) -> Json:
    """Final loss of the choice, and how far above the lowest, over those trained to the end."""
    curves = loss_curves(search)
    ended = ended_curves({id_: c for id_, c in curves.items() if done.status[id_] != "failed"})
    step = max((max(curve) for curve in ended.values()), default=None)
    final = {id_: curve[step] for id_, curve in ended.items() if step is not None}
    price: Json = dict.fromkeys(("final_loss", "regret", "relative_regret"))
    if done.chosen in final:
        low, high = min(final.values()), max(final.values())
        above = final[done.chosen] - low
        price = {
            "final_loss": final[done.chosen],
            "regret": above,
            "relative_regret": above / (high - low) if high > low else 0.0,
        }
    return {"final_step": step, "compared_at_end": len(final), **price}


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
    """Lines of columns two blanks apart."""
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
