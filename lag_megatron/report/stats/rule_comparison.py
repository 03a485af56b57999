"""Rules replayed on a recorded search: the choice and the cost of each."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from lag_megatron.config import GrowthConfig, parse_config
from lag_megatron.config.load import apply_override
from lag_megatron.errors import RunError
from lag_megatron.report.stats.analysis import growth_analysis
from lag_megatron.report.stats.recorded_search import RecordedSearch
from lag_megatron.report.stats.run_files import Json, finite
from lag_megatron.selection import Evaluation, Replay, replay
from lag_megatron.selection.analysis import finished_curves
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


def compare_rules(
    search: RecordedSearch, rules: Sequence[str] = (), settings: Sequence[str] = ()
) -> Json:
    """What each rule would have done with the search, one entry of ``rules`` each.

    Args:
        search: the recorded curves.
        rules: names; without any the search's own.
        settings: ``key=value`` over the search's settings, ``growth.key=value`` too.  With a new
            lag and no new rungs, the rungs from it on are replaced by it.

    Raises:
        ConfigError: if a setting does not hold.
        RunError: if a rule needs an evaluation that was not recorded, or no candidate is left.
    """
    names = rules or [str(search.config.get("rule", GrowthConfig().rule))]
    return {
        "name": search.name,
        "growth": search.growth,
        "candidates": len(search.pool),
        "rules": [_outcome(search, settings_of(search, name, settings)) for name in names],
    }


def own_outcome(search: RecordedSearch, rule: str | None = None) -> Json | None:
    """What a rule does with the search's own settings; None where the recording falls short.

    Without a name, the search's own rule.
    """
    try:
        found: Json = compare_rules(search, [rule] if rule else ())["rules"][0]
    except RunError:
        return None
    return found


def search_data(search: RecordedSearch) -> Json:
    """The analysis of a recorded search, with what its own rule does under ``rules``."""
    own = own_outcome(search)
    lag = own["lag"] if own else settings_of(search, None, ()).last_rung
    failed = {c["id"] for c in (own or {}).get("candidates", ()) if c["status"] == "failed"}
    analysis = growth_analysis(
        search.pool,
        {id_: curve for id_, curve in loss_curves(search).items() if id_ not in failed},
        lag=lag,
        base_val_loss=search.base_val_loss,
        chosen=own["chosen"] if own else None,
        scores={},
    )
    rules = [own] if own else []
    return {"name": search.name, "growth": search.growth, **analysis, "rules": rules}


def loss_curves(search: RecordedSearch) -> dict[str, Curve]:
    """Step after growth and finite validation loss of each candidate, in the pool's order."""
    return {
        c["id"]: [
            (row["step"], value)
            for row in search.curves[c["id"]]
            if (value := finite(row["val_loss"])) is not None
        ]
        for c in search.pool
    }


def settings_of(search: RecordedSearch, rule: str | None, settings: Sequence[str]) -> GrowthConfig:
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


def _outcome(search: RecordedSearch, settings: GrowthConfig) -> Json:
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


def _price(search: RecordedSearch, done: Replay) -> Json:
    """Final loss of the choice, and how far above the lowest, over those trained to the end."""
    curves = loss_curves(search)
    ended = finished_curves({id_: c for id_, c in curves.items() if done.status[id_] != "failed"})
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
