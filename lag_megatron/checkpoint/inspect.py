"""What a checkpoint of any kind holds and what is wrong with it, as JSON values."""

from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.open import describe_any, find_corruption
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import CheckpointError

UNVERIFIED = "unverified: there is no manifest to compare with, so damage cannot be ruled out"


def inspect_checkpoint(
    path: Path, *, verify: bool = False, names: ParamNames | None = None
) -> dict[str, Any]:
    """What a checkpoint holds, and whether it is sound.

    The facts of :func:`~lag_megatron.checkpoint.open.describe_any`, with ``sound`` and a list of
    ``problems``.

    Where the checkpoint cannot be read, ``path`` and ``complete`` are the only other facts.

    Args:
        path: the checkpoint's own directory.
        verify: read all files and compare their checksums.
        names: what the user says of its parameter names.

    Raises:
        PlanError: if the user's names do not fit the model.
    """
    facts: dict[str, Any] = {"path": str(path), "complete": False}
    try:
        facts = describe_any(path, names=names)
        problems = list(facts["problems"])
    except CheckpointError as error:
        problems = [str(error)]
    if verify:
        try:
            problems += find_corruption(path)
        except CheckpointError as error:
            problems.append(str(error))
        if not manifest.is_committed(path):
            problems.append(UNVERIFIED)
    problems = list(dict.fromkeys(problems))
    return facts | {"sound": not problems, "problems": problems}
