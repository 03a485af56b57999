"""What a checkpoint of any kind holds and what is wrong with it, as JSON values."""

from pathlib import Path
from typing import Any

from lag_megatron.checkpoint.open import describe_any, find_corruption, open_checkpoint
from lag_megatron.checkpoint.state.finite import nonfinite_values
from lag_megatron.checkpoint.storage import manifest
from lag_megatron.config.schema.param_names import ParamNames
from lag_megatron.errors import CheckpointError, LagError

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
        verify: read all files, compare their checksums and look for NaN and infinities; the fact
            ``values`` says what was found.
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
        values, found = _checked_values(path)
        facts, problems = facts | {"values": values}, problems + found
        if not manifest.is_committed(path):
            problems.append(UNVERIFIED)
    problems = list(dict.fromkeys(problems))
    return facts | {"sound": not problems, "problems": problems}


def _checked_values(path: Path) -> tuple[str, list[str]]:
    """Whether all values are finite, and each parameter's state that has others."""
    try:
        found = [f"{path}: {values}" for values in nonfinite_values(open_checkpoint(path))]
    except LagError as error:  # e.g. weights of an architecture that is not known
        return f"not checked for NaN and infinities: {error}", []
    return "not finite" if found else "finite", found
