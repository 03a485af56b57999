"""Running lm-evaluation-harness with the task files of this package."""

import contextlib
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lag_megatron.errors import RunError
from lag_megatron.evaluation.task_data import Documents, Json, read_documents
from lag_megatron.small_files import read_json

TASK_FOLDER = Path(__file__).parent / "tasks"
# The number of each task that stands for it in comparisons.
SCORES = {
    "lambada": "acc",
    "triviaqa": "exact_match",
    "tydiqa": "exact_match",
    "wikitext": "word_perplexity",
}
_BOOTSTRAPS = 100
_WINDOWS = ("max_position_embeddings", "n_positions")


def require_harness() -> None:
    """Check that the harness is installed.

    Raises:
        RunError: with the command that installs it.
    """
    try:
        import accelerate  # noqa: F401  # the harness needs it for transformers' models
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RunError(
            f"{error.name} is not installed, which evaluations need: pip install "
            "'lag_megatron[eval]', in a checkout pip install -c constraints.txt -e '.[eval]'."
        ) from None


def evaluate(
    model: Any,
    data: Mapping[str, Path],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
) -> Json:
    """The scores of a model on the tasks that there is data for.

    The examples of 1-shot tasks are drawn by a fixed seed: every model sees the same ones.

    Args:
        model: a directory of transformers, or an ``LM`` of the harness.
        data: each task's file.
        limit: only that many items of each task.
        batch_size: sequences at a time.
        device: torch's name of it.

    Returns:
        by task: ``items``, ``passed_over`` (reason to number), ``file`` and ``metrics``
        (name to ``value`` and ``stderr``, which is None where the harness has none).

    Raises:
        DataError: if a file is missing or of another form, before a model is loaded.
        RunError: if the harness is not installed, or the model's window too short for a task.
    """
    require_harness()
    documents = {task: read_documents(task, path) for task, path in data.items()}
    if isinstance(model, Path):
        _require_window(model, data)
    found = _run(model, data, limit=limit, batch_size=batch_size, device=device)
    return {task: _task(task, found, documents[task], data[task]) for task in data}


def model_window(model: Path) -> int | None:
    """The tokens that a model of transformers takes at most; None where it does not say.

    Raises:
        RunError: if its ``config.json`` cannot be read.
    """
    config = read_json(
        model / "config.json", what="the configuration of a transformers model", error=RunError
    )
    return next((config[key] for key in _WINDOWS if isinstance(config.get(key), int)), None)


def _require_window(model: Path, tasks: Iterable[str]) -> None:
    """Check that the model's window is longer than the answers of each task."""
    window = model_window(model)
    for task in tasks:
        settings = yaml.load((TASK_FOLDER / f"{task}.yaml").read_text(), Loader=_Plain)
        answer_tokens = settings.get("generation_kwargs", {}).get("max_gen_toks", 0)
        if window is not None and answer_tokens >= window:
            raise RunError(
                f"{model}: the task {task} lets a model write {answer_tokens} tokens after its "
                f"prompt, but this one has a window of {window}. Leave the task out with --tasks."
            )


class _Plain(yaml.SafeLoader):
    """Reads task files without importing what they name."""


_Plain.add_constructor("!function", lambda loader, node: node.value)


def _run(model: Any, data: Mapping[str, Path], **options: Any) -> Json:
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = {task: str(path.resolve()) for task, path in data.items()}
    tasks = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data": files}
    )
    is_folder = isinstance(model, Path)
    arguments = {"pretrained": str(model), "dtype": "auto"} if is_folder else None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its progress there
        found = lm_eval.simple_evaluate(
            model="hf" if is_folder else model,
            model_args=arguments,
            tasks=list(data),
            task_manager=tasks,
            metadata={"data": files},
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            **options,
        )
    assert found is not None, "only other ranks of a distributed evaluation get nothing"
    return dict(found)


def _task(task: str, found: Json, documents: Documents, path: Path) -> Json:
    metrics: Json = {}
    for key, value in found["results"][task].items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr"):
            continue
        stderr = found["results"][task].get(f"{name}_stderr,{filter_name}")
        known = isinstance(stderr, int | float)
        metrics[name] = {"value": float(value), "stderr": float(stderr) if known else None}
    first = SCORES[task]
    metrics = {name: metrics[name] for name in sorted(metrics, key=lambda n: (n != first, n))}
    return {
        "items": int(found["n-samples"][task]["effective"]),
        "passed_over": dict(documents.passed_over),
        "file": str(path),
        "metrics": metrics,
    }


def format_results(results: Json) -> str:
    """The results as lines of text, one a metric."""
    lines = [("task", "metric", "value", "stderr", "items")]
    for task, result in results.items():
        for name, metric in result["metrics"].items():
            stderr = "" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
            lines.append((task, name, f"{metric['value']:.4f}", stderr, str(result["items"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True))
        for line in lines
    ]
    for task, result in results.items():
        for reason, number in result["passed_over"].items():
            text.append(f"{task}: {number} items passed over, {reason}")
    return "\n".join(text)
