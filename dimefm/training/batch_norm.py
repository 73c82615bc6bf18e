"""Batch norm in several processes: statistics of all images, of each process's own, or frozen ones.

Whichever it is, all processes hold the same statistics after every step, so that nothing that is validated, averaged or
saved depends on the process that does it.

Shapes: W processes, C channels; x is (B, C) or (B, C, H, W).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dimefm.training.distributed import Place, gather_batch, mean_over_processes_

Statistics = Literal["sync", "local", "frozen"]


def set_statistics(module: torch.nn.Module, kind: Statistics, place: Place) -> None:
    """Let the batch norms of a tower have statistics of this kind. One process alone is left as it is, unless they are
    frozen: then they are in eval mode, and stay so within a module that trains."""
    for norm in batch_norms(module):
        if kind == "frozen":
            norm.eval()
        elif kind == "sync" and place.world > 1:
            norm.__class__ = SyncBatchNorm  # with all that it has: names in a checkpoint stay
            norm.place = place


def batch_norms(module: torch.nn.Module) -> list[Any]:
    """The batch norms of a tower."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def own_statistics(module: torch.nn.Module) -> list[torch.Tensor]:
    """The running statistics that a process would have of its own images alone."""
    return [
        buffer
        for part in module.modules()
        if part.training and not isinstance(part, SyncBatchNorm)
        for name, buffer in part.named_buffers(recurse=False)
        if name.startswith("running_")
    ]


def share_statistics_(statistics: list[torch.Tensor], place: Place) -> None:
    """Replace the statistics of each process, in place, by their mean over processes: that of the means is the mean of
    all images, that of the variances is what a process's own batch can be expected to have."""
    if place.world > 1 and statistics:
        together = torch.cat([value.flatten() for value in statistics])
        mean_over_processes_(together, place)
        parts = together.split([value.numel() for value in statistics])
        torch._foreach_copy_(statistics, [part.view_as(value) for part, value in zip(parts, statistics, strict=True)])


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes, each of which has as many. It takes the place of any batch norm,
    timm's with an activation too, and unlike torch.nn.SyncBatchNorm it works on CPUs and waits for no GPU."""

    place: Place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, and in training bring the running statistics up to date."""
        if self.training:
            x, mean_C, var_C = _Normalised.apply(x, self.weight, self.bias, self.eps, self.place)
            self._update(mean_C, var_C, x.numel() // x.shape[1] * self.place.world)
        else:
            no_statistics = self.running_mean is None
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, no_statistics, 0.0, self.eps
            )
        for part in self.children():  # the dropout and the activation of timm's BatchNormAct2d, in this order
            x = part(x)
        return x

    @torch.no_grad()
    def _update(self, mean_C: torch.Tensor, var_C: torch.Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_((var_C * (count / (count - 1))).to(self.running_var.dtype), share)


class _Normalised(torch.autograd.Function):
    """Ioffe and Szegedy 2015, arXiv:1502.03167, with the mean and the variance over all processes. A gradient is that
    of the sum of what all processes hand back, as in distributed.gather_batch."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_C: Any, bias_C: Any, eps: float, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var_C, mean_C = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
        means_WC, vars_WC = gather_batch(torch.stack([mean_C, var_C])[None], place).unbind(1)
        mean_C = means_WC.mean(dim=0)
        var_C = (vars_WC + (means_WC - mean_C).square()).mean(dim=0)
        ctx.save_for_backward(x, weight_C, mean_C, var_C)
        ctx.eps, ctx.place, ctx.has_bias = eps, place, bias_C is not None
        ctx.mark_non_differentiable(mean_C, var_C)
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, False, 0.0, eps), mean_C, var_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight_C, mean_C, var_C = ctx.saved_tensors
        scale_C = torch.ones_like(mean_C) if weight_C is None else weight_C
        # As if the statistics were constants; their share follows from the sums of grad and of grad times normalised x
        not_saved = mean_C.new_empty(0)
        plain, grad_weight_C, grad_bias_C = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale_C, mean_C, var_C, not_saved, not_saved, False, ctx.eps, [True, True, True]
        )
        sums_2C = torch.stack([grad_bias_C, grad_weight_C])
        if ctx.place.world > 1:
            distributed.all_reduce(sums_2C)
        mean_grad_C, mean_product_C = sums_2C / (x.numel() // x.shape[1] * ctx.place.world)
        invstd_C = (var_C + ctx.eps).rsqrt()
        slope_C = scale_C * invstd_C.square() * mean_product_C
        offset_C = scale_C * invstd_C * mean_grad_C - slope_C * mean_C
        shape = [1, -1, *[1] * (x.ndim - 2)]
        grad_x = (plain - torch.addcmul(offset_C.view(shape), x, slope_C.view(shape))).to(x.dtype)
        return grad_x, None if weight_C is None else grad_weight_C, grad_bias_C if ctx.has_bias else None, None, None
