"""DeepSpeed without ZeRO: every data-parallel replica has all masters, one for each parameter."""

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lag_megatron.checkpoint.state.loss_scale import LossScale
from lag_megatron.engine.deepspeed_adapter.base import DeepSpeedAdapter


class PlainAdapter(DeepSpeedAdapter):
    """In fp32: DeepSpeed has torch's optimizer step on the parameters."""

    stage = "ZeRO stage 0 in fp32"

    @property
    def torch_optimizer(self) -> Optimizer:
        """DeepSpeed's optimizer itself."""
        optimizer: Optimizer = self._optimizer
        return optimizer

    @property
    def masters(self) -> list[Tensor]:
        """The parameters."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @property
    def master_groups(self) -> list[int]:
        """The index of each parameter's group."""
        groups = self._optimizer.param_groups
        return [number for number, group in enumerate(groups) for _ in group["params"]]

    @property
    def trained_parameters(self) -> list[list[Parameter]]:
        """The optimizer's own groups."""
        return [list(group["params"]) for group in self._optimizer.param_groups]

    @property
    def weights(self) -> list[Tensor | None]:
        """None for each parameter, which is its own master."""
        return [None] * len(self.masters)

    @property
    def loss_scale(self) -> LossScale:
        """None: gradients in fp32 are not scaled."""
        return LossScale()

    @loss_scale.setter
    def loss_scale(self, scale: LossScale) -> None:
        """Gradients in fp32 are not scaled."""


class MixedAdapter(DeepSpeedAdapter):
    """In 16 bits: DeepSpeed's optimizer holds an fp32 copy of each parameter."""

    stage = "ZeRO stage 0 in 16 bits"
    required = (
        *DeepSpeedAdapter.required,
        "optimizer.optimizer",
        "optimizer.fp32_groups",
        "optimizer.fp16_groups",
        "optimizer.loss_scale_config",
    )

    @property
    def torch_optimizer(self) -> Optimizer:
        """The optimizer inside DeepSpeed's."""
        optimizer: Optimizer = self._optimizer.optimizer
        return optimizer

    @property
    def masters(self) -> list[Tensor]:
        """A copy of each parameter."""
        return [p for group in self._optimizer.fp32_groups for p in group]

    @property
    def master_groups(self) -> list[int]:
        """The index of each parameter's group."""
        groups = self._optimizer.fp32_groups
        return [number for number, group in enumerate(groups) for _ in group]

    @property
    def trained_parameters(self) -> list[list[Parameter]]:
        """The 16-bit parameters."""
        return [list(group) for group in self._optimizer.fp16_groups]

    @property
    def weights(self) -> list[Tensor | None]:
        """The 16-bit parameters."""
        return [p.data.view(-1) for group in self._optimizer.fp16_groups for p in group]

    @property
    def loss_scale(self) -> LossScale:
        """As DeepSpeed's optimizer keeps it, in a configuration object."""
        return LossScale.of_entries(vars(self._optimizer.loss_scale_config))

    @loss_scale.setter
    def loss_scale(self, scale: LossScale) -> None:
        vars(self._optimizer.loss_scale_config).update(scale.as_entries())
