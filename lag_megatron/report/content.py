"""What a report says, in which order."""

from collections.abc import Iterator

from lag_megatron.report.blocks import Block, Facts, Heading, Table, Text
from lag_megatron.report.figures import (
    curves_figure,
    detail_figure,
    layer_map_drawing,
    ranks_figure,
    run_figure,
)
from lag_megatron.report.read import Json

NONE = "-"
MAX_ROWS = 40


def blocks(data: Json) -> Iterator[Block]:
    """The report of :func:`report_data`'s numbers."""
    yield Heading(1, data["name"])
    yield Text(_status(data))
    for growth in data["growth"]:
        yield Text(f"Growth {growth['growth']}: {_summary(growth)}")
    yield Facts(list(_facts(data)))
    yield Heading(2, "Loss")
    figure = run_figure(data)
    yield figure or Text("No losses have been written yet.")
    if data["val_loss"]:
        yield _validation(data["val_loss"])
    yield Heading(2, "Stages")
    yield _stages(data)
    if not data["growth"]:
        yield Text("Nothing was grown in this run so far.", small=True)
    for growth in data["growth"]:
        yield from _growth(growth)


def _status(data: Json) -> str:
    status = data["status"]
    if status["state"] == "finished":
        again = f", in {status['starts']} starts" if status["starts"] > 1 else ""
        return (
            f"Finished: {status['step']:,} steps{again}. "
            f"Final validation loss {_loss(status['val_loss'])}."
        )
    share = status["step"] / data["total_steps"]
    last = status["last_event"] or "none"
    when = f" at {status['last_time']}" if status["last_time"] else ""
    return (
        f"Not finished: step {status['step']:,} of {data['total_steps']:,} ({share:.0%}). "
        f"Last event in the journal: {last}{when}. If no process is at work, the run was stopped "
        "or has crashed; the command that started it goes on from its last checkpoint."
    )


def _summary(growth: Json) -> str:
    number = len(growth["candidates"])
    head = f"{growth['source_layers']} → {growth['target_layers']} layers at step {growth['step']}."
    if growth["state"] != "decided":
        states = [candidate["status"] for candidate in growth["candidates"]]
        return f"{head} {_count(states, 'finished')} of {number} candidates probed, undecided."
    if number == 1:
        return f"{head} A pool of one, {growth['chosen']}: nothing was compared."
    ties = len(growth["ties"])
    evidence = growth["evidence"]
    words = (
        f"{head} Of {number} candidates {growth['chosen']} has the lowest validation loss after "
        f"{growth['lag']} steps, {_loss(_winner(growth)['loss_at_lag'])}"
    )
    words += f"; {_plural(ties, 'other')} cannot be told apart from it." if ties else "."
    if evidence["lag0_choice"] == growth["chosen"]:
        return f"{words} LAG@0 would have chosen the same."
    return (
        f"{words} LAG@0 would have chosen {evidence['lag0_choice']}, which is "
        f"{_loss(evidence['lag0_regret'])} nats worse there."
    )


def _facts(data: Json) -> Iterator[tuple[str, str]]:
    yield "device", str(data["device"] or NONE)
    yield "ranks", _integer(data["world_size"])
    yield "vocabulary", _integer(data["vocab_size"])
    yield "tokens a step", _integer(data["tokens_per_step"])
    for name, value in data["data"].items():
        if isinstance(value, int | str):
            text = _integer(value) if isinstance(value, int) else value
            yield f"data: {name.replace('_', ' ')}", text
    yield "unigram entropy", _loss(data["unigram_entropy"])


def _stages(data: Json) -> Table:
    rows = [
        (
            str(stage["stage"]),
            str(stage["num_layers"]),
            _integer(stage["parameters"]),
            f"{stage['first_step']:,} to {stage['end_step']:,}",
            _integer(stage["tokens"]),
            _loss(stage["val_loss"]),
            NONE if stage["tokens_per_second"] is None else f"{stage['tokens_per_second']:,.0f}",
            stage["state"],
        )
        for stage in data["stages"]
    ]
    columns = (">stage", ">layers", ">parameters", ">steps", ">tokens", ">validation loss",
               ">tokens/s (median)", "state")  # fmt: skip
    return Table(columns, rows)


def _validation(losses: list[list[float]]) -> Table:
    """The validation losses of the run, evenly thinned, the last one always there."""
    every = -(-len(losses) // MAX_ROWS)
    kept = losses[::-1][::every][::-1]
    rows = [(f"{step:,}", _loss(loss)) for step, loss in kept]
    return Table((">step", ">validation loss"), rows, folded="Validation losses of the run")


def _growth(growth: Json) -> Iterator[Block]:
    title = f"Growth {growth['growth']}: {growth['source_layers']} → {growth['target_layers']}"
    yield Heading(2, f"{title} layers")
    yield Facts(list(_evidence(growth)))
    yield from _failures(growth)
    yield Heading(3, "Candidates")
    yield _candidates(growth)
    yield Text(
        "Layers from bottom to top, numbered as before growth: outlined boxes are old layers, "
        "filled ones with * are copies of that layer, dashed R are freshly initialised.",
        small=True,
    )
    yield from _pictures(growth)
    yield _curves(growth)
    yield Heading(3, "Cost")
    yield Facts(list(_cost(growth)))


def _pictures(growth: Json) -> Iterator[Block]:
    if curves := curves_figure(growth):
        yield Heading(3, "Validation loss after growth")
        yield curves
    if detail := detail_figure(growth):
        yield detail
    if ranks := ranks_figure(growth):
        yield Heading(3, f"Ranks at 0 and at {growth['lag']}")
        yield ranks


def _evidence(growth: Json) -> Iterator[tuple[str, str]]:
    evidence, lag = growth["evidence"], growth["lag"]
    yield "validation loss before", _loss(growth["base_val_loss"])
    yield "rule", f"{growth['rule']}, decides {lag} steps after growth"
    yield "winner", growth["chosen"] or "not decided yet"
    if len(growth["candidates"]) == 1:
        return
    yield "ties with the winner", ", ".join(growth["ties"]) or "none"
    yield "LAG@0 would have chosen", evidence["lag0_choice"] or NONE
    yield (
        f"its loss above the best at {lag}",
        f"{_loss(evidence['lag0_regret'])} (relative regret "
        f"{_fixed(evidence['lag0_relative_regret'], 2)})",
    )
    yield (
        f"losses at 0 and at {lag}",
        f"Spearman {_fixed(evidence['spearman'], 3)}, Pearson {_fixed(evidence['pearson'], 3)}",
    )
    yield (
        "worst minus best",
        f"{_loss(evidence['spread_at_0'])} at 0, {_loss(evidence['spread_at_lag'])} at {lag}",
    )


def _failures(growth: Json) -> Iterator[Block]:
    failed = [c for c in growth["candidates"] if c["status"] == "failed"]
    if failed:
        yield Heading(3, "Failed candidates")
        rows = [(c["id"], f"{c['steps']:,}", c["reason"] or NONE) for c in failed]
        yield Table(("candidate", ">after steps", "reason"), rows)


def _candidates(growth: Json) -> Table:
    lag = growth["lag"]
    columns = (f">rank at {lag}", ">rank at 0", ">change", "candidate", "layers", ">loss at 0",
               f">loss at {lag}", ">behind winner", "remark")  # fmt: skip
    rows, marks = [], []
    for candidate in growth["candidates"]:
        rows.append(
            (
                _integer(candidate["rank_at_lag"]),
                _integer(candidate["rank_at_0"]),
                _change(candidate),
                candidate["id"],
                layer_map_drawing(candidate),
                _loss(candidate["loss_at_0"]),
                _loss(candidate["loss_at_lag"]),
                _loss(candidate["behind_winner"]),
                _remark(candidate, growth),
            )
        )
        marks.append("win" if candidate["id"] == growth["chosen"] else candidate["status"])
    return Table(columns, rows, marks)


def _change(candidate: Json) -> str:
    first, last = candidate["rank_at_0"], candidate["rank_at_lag"]
    if first is None or last is None:
        return NONE
    return "=" if first == last else f"▲{first - last}" if first > last else f"▼{last - first}"


def _remark(candidate: Json, growth: Json) -> str:
    words = []
    if candidate["id"] == growth["chosen"]:
        words.append("winner")
    if candidate["id"] == growth["evidence"]["lag0_choice"] and len(growth["candidates"]) > 1:
        words.append("LAG@0")
    if candidate["id"] in growth["ties"]:
        words.append("tie")
    if candidate["status"] != "finished":
        words.append(candidate["status"])
    return ", ".join(words)


def _curves(growth: Json) -> Table:
    steps = sorted({step for c in growth["candidates"] for step, _ in c["curve"]})
    rows = []
    for candidate in growth["candidates"]:
        losses = dict(candidate["curve"])
        rows.append((candidate["id"], *(_loss(losses.get(step)) for step in steps)))
    columns = ("candidate", *(f">step {step:,}" for step in steps))
    return Table(columns, rows, folded="Validation losses as numbers")


def _cost(growth: Json) -> Iterator[tuple[str, str]]:
    cost = growth["cost"]
    yield "probe steps, all candidates", _integer(cost["probe_steps"])
    share = cost["extra_of_continuation"]
    extra = f"{cost['extra_steps']:,} = {cost['extra_of_run']:.1%} of the run's steps"
    extra += "" if share is None else f", {share:.1%} of the stage's that follows"
    yield "beyond the winner's own", extra
    if cost.get("tokens") is not None:
        yield "tokens", _integer(cost["tokens"])
    if cost.get("flops") is not None:
        whole = cost["flops_of_run"]
        of_run = "" if whole is None else f" = {whole:.1%} of the run's training"
        yield "FLOPs", f"{cost['flops']:.2e}{of_run}"
    if cost.get("seconds") is not None:
        yield "time", _duration(cost["seconds"])


def _winner(growth: Json) -> Json:
    found: Json = next(c for c in growth["candidates"] if c["id"] == growth["chosen"])
    return found


def _count(states: list[str], state: str) -> int:
    return sum(1 for one in states if one == state)


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _integer(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _loss(value: float | None) -> str:
    return _fixed(value, 4)


def _fixed(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
