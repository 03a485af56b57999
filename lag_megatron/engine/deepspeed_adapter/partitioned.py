"""ZeRO 1 to 3: each rank has a part of the masters, in flat buffers."""

import abc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lag_megatron.checkpoint.state.loss_scale import LossScale
from lag_megatron.engine.deepspeed_adapter.base import DeepSpeedAdapter


class ZeroPartition(NamedTuple):
    """What a step needs of one flat buffer of masters.

    Attributes:
        group: index of its parameter group.
        master: fp32 weights, of length n.
        weights: the model's weights that follow them, of length n.
        gradients: parts that joined are the gradient of ``master``.
    """

    group: int
    master: Tensor
    weights: Tensor
    gradients: list[Tensor]


class PartitionedAdapter(DeepSpeedAdapter):
    """What the stages have in common, and the parts that an optimizer step is made of.

    A step calls :meth:`begin_step`, :meth:`gradients`, :meth:`set_grad_norm`,
    :meth:`drop_unneeded_gradients`, then :meth:`partition` and :meth:`finish_partition` for each
    buffer of masters, and :meth:`finish_step`.
    """

    required = (
        *DeepSpeedAdapter.required,
        "optimizer.optimizer",
        "optimizer.step",
        "optimizer.loss_scaler",
        "optimizer.clip_grad",
        "optimizer.device",
        "optimizer.overflow",
        "optimizer.averaged_gradients",
        "optimizer.dp_process_group",
        "optimizer.model_parallel_rank",
        "optimizer._model_parallel_all_reduce",
        "optimizer._global_grad_norm",
    )

    @property
    def torch_optimizer(self) -> Optimizer:
        """The optimizer inside DeepSpeed's."""
        optimizer: Optimizer = self._optimizer.optimizer
        return optimizer

    @property
    def loss_scale(self) -> LossScale:
        """As DeepSpeed's optimizer keeps it, in a scaler object."""
        return LossScale.of_object(self._optimizer.loss_scaler)

    @loss_scale.setter
    def loss_scale(self, scale: LossScale) -> None:
        vars(self._optimizer.loss_scaler).update(vars(scale.as_object()))

    @property
    def device(self) -> torch.device:
        """Where a norm is reduced."""
        return torch.device(self._optimizer.device)

    @property
    def max_grad_norm(self) -> float:
        """The norm that gradients are clipped to; 0 for no clipping."""
        return float(self._optimizer.clip_grad)

    @property
    def is_first_tensor_rank(self) -> bool:
        """Whether this rank counts the parameters that tensor-parallel ranks hold whole."""
        return bool(self._optimizer.model_parallel_rank == 0)

    def replace_step(self, step: Callable[[], None]) -> None:
        """Have DeepSpeed call ``step`` instead of its own optimizer step."""
        self._optimizer.step = step

    def skip_reduction_without_replicas(self) -> None:
        """Leave gradients where they are if there is no second replica to average them with."""

    def sum_over_ranks(self, value: Tensor) -> None:
        """Add up a value over data-parallel and tensor-parallel ranks, in place."""
        dist.all_reduce(value, group=self._optimizer.dp_process_group)
        self._optimizer._model_parallel_all_reduce(tensor=value, op=dist.ReduceOp.SUM)

    def set_grad_norm(self, norm: Tensor) -> None:
        """Report a norm, of gradients before clipping, as that of the step."""
        self._optimizer._global_grad_norm = norm
        self._optimizer.overflow = False

    @abc.abstractmethod
    def begin_step(self) -> None:
        """DeepSpeed's bookkeeping before a step."""

    @abc.abstractmethod
    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's gradients without padding, each with its parameter."""

    @abc.abstractmethod
    def drop_unneeded_gradients(self) -> None:
        """Free the gradients that no partition of this rank needs."""

    @abc.abstractmethod
    def partition(self, number: int) -> ZeroPartition:
        """What a step updates of buffer ``number`` of the masters, and with which gradients."""

    @abc.abstractmethod
    def finish_partition(self, number: int) -> None:
        """After an update of buffer ``number``: free its gradients and share its weights."""

    def finish_step(self) -> None:
        """DeepSpeed's bookkeeping after a step."""
