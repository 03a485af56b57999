"""Files of runs, of searches by ask and tell, and recorded searches."""

import json
from pathlib import Path

from kind import Kind
from searched_runs import exhaustive_run, halved_run

from lag_megatron.report import report_data, write_search
from lag_megatron.report.stats.recorded_search import read_search
from lag_megatron.report.stats.rule_comparison import compare_rules, search_data
from lag_megatron.run.directory import read_decision, read_facts
from lag_megatron.run.metrics import MetricsLog

RUN = "halved"
_USERS = "what a run measured is not known elsewhere"
_READ = ("report.stats.run_files", "run.journal", "run.metrics", "run.directory", "config.load")


def _report(folder: Path) -> object:
    data = report_data(folder / RUN)
    return json.dumps(data, allow_nan=False)


def _of_run(name: str, file: str, form: str) -> Kind:
    return Kind(
        name=f"run: {name}",
        modules=_READ,
        build=halved_run,
        file=f"{RUN}/{file}",
        form=form,
        read=_report,
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    )


def _recorded(folder: Path) -> None:
    run = exhaustive_run(folder)
    write_search(run, 1, folder / "search.json")


def _compared(folder: Path) -> object:
    search = read_search(folder / "search.json")
    return search_data(search), compare_rules(search, ["lag"], [])


KINDS = [
    _of_run("config.yaml", "config.yaml", "yaml"),
    _of_run("run.json", "run.json", "json"),
    _of_run("journal", "journal.jsonl", "jsonl"),
    _of_run("metrics", "metrics.jsonl", "jsonl"),
    _of_run("pool", "growth01/pool.json", "json"),
    _of_run("decision", "growth01/decision.json", "json"),
    _of_run("probe", "growth01/*/probe.jsonl", "jsonl"),
    Kind(
        name="run: facts where it is resumed",
        modules=("run.directory",),
        build=halved_run,
        file=f"{RUN}/run.json",
        form="json",
        read=lambda folder: read_facts(folder / RUN),
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    ),
    Kind(
        name="run: decision where it is resumed",
        modules=("run.directory",),
        build=halved_run,
        file=f"{RUN}/growth01/decision.json",
        form="json",
        read=lambda folder: read_decision(folder / RUN / "growth01"),
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    ),
    Kind(
        name="run: metrics where it is resumed",
        modules=("run.metrics",),
        build=halved_run,
        file=f"{RUN}/metrics.jsonl",
        form="jsonl",
        read=lambda folder: MetricsLog(folder / RUN / "metrics.jsonl").last("val/loss"),
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    ),
    Kind(
        name="recorded search",
        modules=("report.stats.recorded_search",),
        build=_recorded,
        file="search.json",
        form="json",
        read=_compared,
        names=("demo, growth", "the rule on demo"),
        values_are_free=_USERS,
        bytes_are_free=_USERS,
    ),
]
