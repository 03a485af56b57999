"""Growth plans: what to do to a training state, as a small value with a digest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from lag_megatron.errors import PlanError
from lag_megatron.growth.layer_map import LayerMap
from lag_megatron.growth.operators import layer_map_of

MomentPolicy = Literal["copy", "zero", "borrow"]
MOMENT_POLICIES: tuple[MomentPolicy, ...] = ("copy", "zero", "borrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowthPlan:
    """A growth operator with its options, shapes, moment policy and seed.

    Attributes:
        operator: name in ``lag_megatron.growth.operators.OPERATORS``.
        options: the operator's options, e.g. ``{"index": 4, "block_size": 2, "init": "random"}``.
        source_layers: layers before.
        target_layers: layers after.
        moments: what the Adam moments of new layers become; ``auto`` copies those of duplicates
            and borrows for random layers, so that no first update is taken with v = 0 under a
            large step (it would be (1 - beta1) / sqrt(1 - beta2) times the learning rate).
        seed: key of freshly drawn weights.
        init_std: standard deviation of freshly drawn weights; projections back into the residual
            stream take ``init_std / sqrt(2 * target_layers)``, as Megatron-Core does.

    Raises:
        PlanError: when the operator cannot be applied to these shapes.
    """

    operator: str
    options: Mapping[str, object] = field(default_factory=dict)
    source_layers: int
    target_layers: int
    moments: MomentPolicy | Literal["auto"] = "auto"
    seed: int = 1234
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.moments not in (*MOMENT_POLICIES, "auto"):
            allowed = ", ".join(("auto", *MOMENT_POLICIES))
            raise PlanError(f"moments {self.moments!r} is not a policy. Allowed: {allowed}.")
        layer_map_of(self.operator, self.source_layers, self.target_layers, self.options)

    @property
    def layer_map(self) -> LayerMap:
        """The origin of each layer of the grown model."""
        return layer_map_of(self.operator, self.source_layers, self.target_layers, self.options)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name this plan."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON, the same for equal plans."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str, *, source: str = "plan") -> "GrowthPlan":
        """Read a plan back.

        Raises:
            PlanError: for text that is not a plan.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source}: not JSON: {error}") from None
        known = {f.name for f in fields(GrowthPlan)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise PlanError(f"{source}: expected a mapping with the keys {', '.join(known)}.")
        try:
            return GrowthPlan(**values)
        except TypeError as error:
            raise PlanError(f"{source}: {error}") from None

    @staticmethod
    def read(path: Path) -> "GrowthPlan":
        """Read a plan file."""
        try:
            return GrowthPlan.from_json(path.read_text(), source=str(path))
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror}.") from None
