"""What every ZeRO stage has in common, and the check of the installed version."""

import abc
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor

from lag_megatron.checkpoint.state.loss_scale import LossScale
from lag_megatron.errors import DeepSpeedVersionError

# As setup.py requires; a test compares the two.
KNOWN_VERSIONS = ">=0.19,<0.20"
# What DeepSpeed counts, under the same names in its engine and in its checkpoints.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class DeepSpeedAdapter(abc.ABC):
    """An initialized DeepSpeed engine's state on this rank.

    Lists of tensors have one entry for each buffer of masters, in the order of :attr:`masters`.

    Args:
        engine: what ``deepspeed.initialize`` returns.

    Raises:
        DeepSpeedVersionError: if the engine lacks one of the attributes in ``required``.
    """

    stage: ClassVar[str]
    # Paths of attributes from the engine; "()" calls a method that only looks something up.
    required: ClassVar[tuple[str, ...]] = (*_COUNTERS, "optimizer.param_groups")
    # Attributes of the model's parameters.
    required_of_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, engine: Any) -> None:
        self._require_attributes(engine)
        self._engine = engine
        self._optimizer = engine.optimizer

    def _require_attributes(self, engine: Any) -> None:
        missing = [path for path in self.required if not _exists(engine, path)]
        if self.required_of_parameters:
            parameter = next(iter(engine.module.parameters()))
            names = self.required_of_parameters
            missing += [f"parameter.{name}" for name in names if not _exists(parameter, name)]
        if missing:
            kind = type(engine.optimizer).__name__
            raise DeepSpeedVersionError(
                f"DeepSpeed {version('deepspeed')} under {self.stage} (optimizer {kind}) has no "
                f"{', '.join(missing)}. Versions that are known to work: {KNOWN_VERSIONS}. Install "
                f"one of them: pip install 'deepspeed{KNOWN_VERSIONS}'."
            )

    @property
    def module(self) -> torch.nn.Module:
        """The model."""
        module: torch.nn.Module = self._engine.module
        return module

    @property
    @abc.abstractmethod
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps, whose state is by buffer of masters."""

    @property
    @abc.abstractmethod
    def masters(self) -> list[Tensor]:
        """This rank's buffers of fp32 weights, which the optimizer steps on."""

    @property
    @abc.abstractmethod
    def master_groups(self) -> list[int]:
        """The index of each buffer's parameter group."""

    @property
    @abc.abstractmethod
    def trained_parameters(self) -> list[list[torch.nn.Parameter]]:
        """The parameters that are trained, by parameter group, in flat order."""

    def untrained_weights(self, parameter: torch.nn.Parameter) -> Tensor:
        """This rank's part of the weights of a parameter that is not trained, flat."""
        return parameter.data.view(-1)

    @property
    @abc.abstractmethod
    def weights(self) -> list[Tensor | None]:
        """The weights that the model computes with, which follow the masters.

        Each is this rank's part, flat and as long as its buffer of masters; None where the master
        is the weight itself.
        """

    def sync_weights(self, *, written: bool = False) -> None:
        """Bring the weights up to the masters, together with all replicas.

        With ``written`` this rank's own part is up to date, and only has to reach the others.
        """
        if written:
            return
        for weights, master in zip(self.weights, self.masters, strict=True):
            if weights is not None:
                weights.copy_(master.detach().view(-1))

    @property
    @abc.abstractmethod
    def loss_scale(self) -> LossScale:
        """What gradients are multiplied by."""

    @loss_scale.setter
    @abc.abstractmethod
    def loss_scale(self, scale: LossScale) -> None: ...

    @property
    def counters(self) -> dict[str, Any]:
        """Steps and samples that DeepSpeed has counted, under the names of its checkpoints."""
        return {name: getattr(self._engine, name) for name in _COUNTERS}

    def set_counters(self, header: Mapping[str, Any]) -> None:
        """Take the counters from a checkpoint's header."""
        for name in _COUNTERS:
            setattr(self._engine, name, header[name])

    def prepare_partial_step(self) -> None:  # noqa: B027
        """Before a step in which some layers do not run; most stages need nothing."""


def _exists(root: Any, path: str) -> bool:
    """Whether a path of attributes leads somewhere."""
    for part in path.split("."):
        name = part.removesuffix("()")
        try:
            root = getattr(root, name)
        except AttributeError:
            return False
        if name != part:
            root = root()
    return True
