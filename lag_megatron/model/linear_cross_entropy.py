"""The output layer and the cross-entropy of its logits in one, in chunks, under tensor parallelism.

Logits of a whole batch never exist: those of some rows are made, turned into their gradient in
place, and multiplied back at once, as Liger Kernel does (Hsu et al. 2024, arXiv 2410.10989,
section 3.2); here the vocabulary may be cut over tensor-parallel ranks as well (Shoeybi et al.
2019, section 3).  Backward only scales what forward found, so no product is computed twice.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from lag_megatron.config import ModelConfig
from lag_megatron.kernels.softmax import has_kernel, logits_to_gradient, row_statistics
from lag_megatron.model.bf16_emulation import needs_bf16_emulation

# Bytes of a chunk's logits: on a CPU enough rows for fast products while they stay near the cache,
# on a GPU enough to fill it.
_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 30}
_TILE = 128  # rows of a product that a GPU takes at a time


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which of the vocabulary's rows this rank has, and with whom it shares the others."""

    first: int = 0
    group: dist.ProcessGroup | None = None

    def reduce(self, values: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """``values`` of all ranks together, in place."""
        if self.group is not None:
            dist.all_reduce(values, how, group=self.group)
        return values


class LossLinear(ColumnParallelLinear):
    """An output layer that also computes the loss of its logits, if it is given labels.

    A model's own layer becomes one by :meth:`adopt`; parameters and their names stay.
    """

    label_smoothing = z_loss = 0.0

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear, model: ModelConfig) -> None:
        """Give a layer that Megatron-Core has built this forward, and a model's kind of loss."""
        layer.__class__ = cls
        layer.label_smoothing, layer.z_loss = model.label_smoothing, model.z_loss

    def forward(
        self,
        hidden_sbd: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits as Megatron-Core gives them, or the sum of the labels' cross-entropies.

        Args:
            hidden_sbd: (s, b, d), or under sequence parallelism this rank's part of s.
            weight: (vocabulary / tensor, d), where it is another layer's.
            labels: int64 (b, s); None asks for logits.
            loss_mask: fp32 (b, s), the weight of each label.
        """
        if labels is None or loss_mask is None:
            return super().forward(hidden_sbd, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden_sbd = gather_from_sequence_parallel_region(hidden_sbd, group=self.tp_group)
        else:
            hidden_sbd = copy_to_tensor_model_parallel_region(hidden_sbd, group=self.tp_group)
        parts = dist.get_world_size(self.tp_group) if dist.is_initialized() else 1
        rank = dist.get_rank(self.tp_group) if parts > 1 else 0
        mine = VocabShard(rank * weight.shape[0], self.tp_group if parts > 1 else None)
        # Labels are turned, not hidden states: Megatron-Core sums gradients over tensor-parallel
        # ranks in a copy, which it drops, where they are not contiguous.
        loss = linear_cross_entropy(
            hidden_sbd.reshape(-1, hidden_sbd.shape[-1]),
            weight,
            self.bias,
            labels.t().reshape(-1),
            loss_mask.t().reshape(-1),
            mine,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )
        return loss, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    mine: VocabShard | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of ``loss_mask`` times the cross-entropy of ``hidden weight^T + bias``.

    Args:
        hidden: (n, d) in any floating type; products are computed in it, the softmax in fp32 or
            above.
        weight: (v, d), this rank's rows of the vocabulary.
        bias: (v,) or None.
        labels: int64 (n,), numbers in the whole vocabulary; of rows of weight 0 they are ignored.
        loss_mask: (n,).
        mine: the vocabulary's cut; None is a whole one.
        label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016,
            section 7).
        z_loss: coefficient of the squared log of the softmax's sum (Chowdhery et al. 2022, PaLM,
            section 5).
        chunk: logits that exist at a time; by default what suits the device.

    Returns:
        A scalar, the same on all ranks; the gradient of ``hidden`` is this rank's part of a sum.
    """
    if hidden.device.type == "cpu":  # no one waits for the number of rows there
        kept = loss_mask != 0
        if not bool(kept.all()):
            hidden, labels, loss_mask = hidden[kept], labels[kept], loss_mask[kept]
    if needs_bf16_emulation(hidden.dtype, hidden.device):
        hidden, weight = hidden.float(), weight.float()
        bias = None if bias is None else bias.float()
    size = chunk or _CHUNK.get(hidden.device.type, _CHUNK["cuda"]) // hidden.element_size()
    rows = max(1, size // max(weight.shape[0], 1))
    if hidden.is_cuda:
        rows = rows // _TILE * _TILE or rows
    options = (mine or VocabShard(), label_smoothing, z_loss, rows, torch.is_grad_enabled())
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, loss_mask, options)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, loss_mask, options):  # type: ignore[no-untyped-def]
        mine, smoothing, z_loss, rows, trained = options
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants = [trained and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        summed = wide if len(hidden) > rows else hidden.dtype
        make = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills them
        made = [
            make(tensor, dtype=kind) if wanted else None
            for tensor, kind, wanted in zip(
                (hidden, weight, bias), (hidden.dtype, summed, summed), wants, strict=True
            )
        ]
        whole = mine.reduce(torch.full((), float(weight.shape[0]), device=hidden.device))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            if not has_kernel(logits.dtype, logits.device):
                logits = logits.to(wide)
            share = loss_mask[part].to(wide)
            total += _chunk(logits, labels[part], share, mine, smoothing, z_loss, whole)
            if any(wants):
                _multiply_back(logits.to(hidden.dtype), hidden, weight, part, made)
            del logits  # before the next ones are made
        ctx.made = [
            None if m is None else m.to(t.dtype)
            for m, t in zip(made, (hidden, weight, bias), strict=True)
        ]
        return total.float() if wide is torch.float32 else total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.made is None:
            raise RuntimeError("a second backward pass of the loss: the first scaled its gradients")
        found = [None if made is None else made.mul_(grad.to(made.dtype)) for made in ctx.made]
        ctx.made = None  # scaled in place: a second backward would find them wrong
        return (*found, None, None, None)


def _chunk(
    logits: Tensor,
    labels: Tensor,
    share: Tensor,
    mine: VocabShard,
    smoothing: float,
    z_loss: float,
    vocabulary: Tensor,
) -> Tensor:
    """The chunk's loss; ``logits`` (rows, v) become the gradient."""
    place = labels - mine.first
    is_mine = (place >= 0) & (place < logits.shape[1])
    place = place.clamp(0, logits.shape[1] - 1)
    top, sums = row_statistics(logits, place, is_mine, with_sum=smoothing > 0)
    highest = mine.reduce(top.clone(), dist.ReduceOp.MAX)
    below = top - highest  # of what this rank's rows of the vocabulary are relative to
    sums[0] += torch.where(is_mine, below, 0.0)
    sums[1] += logits.shape[1] * below
    sums[2] *= below.exp()
    at_label, everywhere, normaliser = mine.reduce(sums)
    log_sum = normaliser.log()
    losses = log_sum - (1.0 - smoothing) * at_label
    if smoothing:
        losses -= smoothing * everywhere / vocabulary
    factor = share * below.exp() / normaliser
    if z_loss:
        whole_log = log_sum + highest
        losses += z_loss * whole_log.square()
        factor = factor * (1.0 + 2.0 * z_loss * whole_log)
    taken = torch.where(is_mine, (smoothing - 1.0) * share, 0.0)
    logits_to_gradient(logits, top, factor, smoothing * share / vocabulary, place, taken)
    return (losses * share).sum()


def _multiply_back(
    gradient: Tensor, hidden: Tensor, weight: Tensor, part: slice, made: list[Tensor | None]
) -> None:
    """Add a chunk's part of the gradients of hidden states, weight and bias, or begin with it."""
    of_hidden, of_weight, of_bias = made
    if of_hidden is not None:
        torch.mm(gradient, weight, out=of_hidden[part])
    is_first = part.start == 0
    if of_weight is not None:
        if of_weight.dtype == hidden.dtype:
            torch.addmm(
                of_weight, gradient.t(), hidden[part], beta=0.0 if is_first else 1.0, out=of_weight
            )
        else:
            _add(of_weight, gradient.t() @ hidden[part], is_first=is_first)
    if of_bias is not None:
        _add(of_bias, gradient.sum(dim=0, dtype=of_bias.dtype), is_first=is_first)


def _add(total: Tensor, more: Tensor, *, is_first: bool) -> None:
    if is_first:
        total.copy_(more)
    else:
        total += more
