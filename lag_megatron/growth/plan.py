"""Growth plans: an operator with its options and layer counts, as a small value with a digest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lag_megatron.checkpoint.families.layer_stack import find_layer_stack, largest_stack
from lag_megatron.config.schema.param_names import ParamNames, parse_param_names
from lag_megatron.config.schema.ranges import MAX_LAYERS, MAX_SEED, require_positive, require_whole
from lag_megatron.errors import LagError, PlanError
from lag_megatron.growth.operators import layer_map_of
from lag_megatron.growth.operators.layer_map import LayerMap, keeps_old_norms, moves_second_norm
from lag_megatron.small_files import parse_json, read_text

if TYPE_CHECKING:
    from lag_megatron.checkpoint.state.source import CheckpointSource

MomentPolicy = Literal["copy", "zero", "borrow"]
_REQUIRED = ("operator", "source_layers", "target_layers")
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
            and borrows for random layers and for those whose branches output zeros, so that no
            first update is taken with v = 0 under a large step (it would be
            (1 - beta1) / sqrt(1 - beta2) times the learning rate).  For ``staged`` it is zero, as
            in its paper, whose schedule warms the rate up again after growing.
        seed: key of freshly drawn weights.
        init_std: standard deviation of freshly drawn weights; projections back into the residual
            stream take ``init_std / sqrt(2 * target_layers)``, as Megatron-Core does.
        names: what the user says of the model's parameter names, where no table has them; a plain
            mapping is taken too.

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
    names: ParamNames | None = None

    def __post_init__(self) -> None:
        if self.names is not None and not isinstance(self.names, ParamNames):
            names = parse_param_names(self.names, where="names")
            object.__setattr__(self, "names", names)
        if self.moments not in (*MOMENT_POLICIES, "auto"):
            allowed = ", ".join(("auto", *MOMENT_POLICIES))
            raise PlanError(f"moments {self.moments!r} is not a policy. Allowed: {allowed}.")
        self._check_values()
        layer_map_of(self.operator, self.source_layers, self.target_layers, self.options)

    def _check_values(self) -> None:
        """Refuse what is no value of its kind, as a plan file or an option may give."""
        if not isinstance(self.operator, str):
            raise PlanError(f"operator: expected a name (got {self.operator!r}).")
        if not isinstance(self.options, Mapping):
            raise PlanError(f"options: expected a mapping of names (got {self.options!r}).")
        for name in ("source_layers", "target_layers"):
            require_whole(getattr(self, name), name, error=PlanError, most=MAX_LAYERS)
        require_whole(self.seed, "seed", error=PlanError, most=MAX_SEED)
        require_positive(self.init_std, "init_std", error=PlanError)

    @property
    def layer_map(self) -> LayerMap:
        """The origin of each layer of the grown model."""
        return layer_map_of(self.operator, self.source_layers, self.target_layers, self.options)

    @property
    def new_layers(self) -> frozenset[int]:
        """Numbers of the grown model's layers that are new."""
        return frozenset(i for i, origin in enumerate(self.layer_map) if origin.is_new)

    def preserves_function(self, norm_position: str = "pre") -> bool:
        """Whether the grown model computes the old function, by its layer map.

        Under pre-LN a new layer whose branches output zeros is the identity, be it by its output
        projections (Gesmundo and Maile 2023, arXiv 2308.06103, "layer addition"; Wu et al. 2024,
        arXiv 2401.02415) or by its norms (Shen et al. 2022, arXiv 2203.06211).  Under post-LN
        (``norm_position="post"``) its projections have to be zero, and the affine part of the norm
        before it has to move to its own second norm (``post_ln_identity``).
        """
        layer_map = self.layer_map
        kept = [o for o in layer_map if not o.is_new]
        return (
            [o.source for o in kept] == list(range(self.source_layers))
            and all(o.is_identity_branch if o.is_new else o.branch_scale == 1 for o in layer_map)
            and (
                moves_second_norm(layer_map)
                if norm_position == "post"
                else keeps_old_norms(layer_map)
            )
        )

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name this plan."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON, the same for equal plans."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which ``GrowthPlan(**values)`` makes an equal plan.

        Without names they are those of plans from before there were any, and so is the digest.
        """
        values = asdict(self)
        if self.names is None:
            del values["names"]
        return values

    @classmethod
    def for_checkpoint(
        cls,
        checkpoint: str | Path,
        *,
        operator: str,
        layers: int | None = None,
        moments: MomentPolicy | Literal["auto"] = "auto",
        seed: int = 1234,
        init_std: float | None = None,
        names: ParamNames | Mapping[str, Any] | None = None,
        **options: object,
    ) -> "GrowthPlan":
        """The plan that grows a checkpoint of any format, whose layers are counted.

        Args:
            checkpoint: its directory, or one with a pointer file to it.
            operator: name in ``lag_megatron.growth.operators.OPERATORS``.
            layers: layers after growing; by default as many as before.
            moments: what the Adam moments of new layers become.
            seed: key of freshly drawn weights.
            init_std: standard deviation of freshly drawn weights; by default that of the model,
                where the checkpoint records it, or 0.02.
            names: what the user says of the model's parameter names, where no table has them, e.g.
                ``{"layers": "transformer.h.{}"}``.
            options: of the operator, e.g. ``index=4, block_size=2``; ``init`` of ``lag`` is
                ``duplicate`` by default.

        Raises:
            PlanError: if the operator cannot be applied to these shapes, or the model has two
                stacks of layers.
            CheckpointError: if there is no checkpoint, or it is damaged.
        """
        from lag_megatron.checkpoint.open import open_checkpoint  # brings torch

        settings: dict[str, Any] = {} if init_std is None else {"init_std": init_std}
        if operator == "lag":
            options.setdefault("init", "duplicate")
        return cls.for_source(
            open_checkpoint(Path(checkpoint)),
            operator=operator,
            target_layers=layers,
            options=options,
            names=names,
            moments=moments,
            seed=seed,
            **settings,
        )

    @classmethod
    def for_source(
        cls,
        source: "CheckpointSource",
        *,
        operator: str,
        target_layers: int | None = None,
        options: Mapping[str, object] | None = None,
        names: ParamNames | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> "GrowthPlan":
        """The plan that grows an open checkpoint.

        Args:
            source: its layers are counted, and ``init_std`` is by default that of its model.
            operator: name in ``OPERATORS``.
            target_layers: layers after growing; by default as many as before.
            options: of the operator.
            names: what the user says of the model's parameter names, where no table has them.
            settings: ``moments``, ``seed`` and ``init_std``, where given.

        Raises:
            PlanError: if the operator cannot be applied to these shapes.
        """
        from lag_megatron.checkpoint.state.source import unsharded_shapes  # brings torch

        if names is not None and not isinstance(names, ParamNames):
            names = parse_param_names(names, where="names")
        stack_of = largest_stack if operator == "identity" else find_layer_stack
        stack = stack_of(unsharded_shapes(source), names)
        source_layers = len(stack.numbers) if stack else 0
        model = source.client_state.get("model") or {}
        if "init_std" in model:
            settings.setdefault("init_std", model["init_std"])
        return cls(
            operator=operator,
            options=options or {},
            source_layers=source_layers,
            target_layers=source_layers if target_layers is None else target_layers,
            names=names,
            **settings,
        )

    @staticmethod
    def from_json(text: str, *, source: str = "plan") -> "GrowthPlan":
        """Read a plan back.

        Raises:
            PlanError: for text that is not a plan.
        """
        values = parse_json(text, where=source, what="a growth plan", error=PlanError)
        known = [f.name for f in fields(GrowthPlan)]
        if unknown := [key for key in values if key not in known]:
            raise PlanError(
                f"{source}: a growth plan has no {unknown[0]!r}. Its keys are {', '.join(known)}."
            )
        if missing := [key for key in _REQUIRED if key not in values]:
            raise PlanError(f"{source}: a growth plan needs {missing[0]!r}, which is not there.")
        try:
            return GrowthPlan(**values)
        except LagError as error:
            raise PlanError(f"{source}: {error}") from None

    @staticmethod
    def read(path: Path) -> "GrowthPlan":
        """Read a plan file.

        Raises:
            PlanError: if it cannot be read or is not a plan.
        """
        text = read_text(path, what="a growth plan as JSON", error=PlanError)
        return GrowthPlan.from_json(text, source=str(path))
