"""Root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
ROWS = 1 << 18  # number of values that are worked on together


class _OnCPU(torch.autograd.Function):
    """The norm a few rows at a time, which stay in the processor's cache.

    On CPUs torch composes the norm and its gradient of a dozen passes over the whole tensor; this takes half the time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, *weight.shape)
        step, size = max(ROWS // weight.numel(), 1), x.shape[-1]
        out, scales = torch.empty_like(rows), []
        for part, part_out in zip(rows.split(step), out.split(step), strict=True):
            norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float32)
            scales.append(norm.square_().mul_(1 / size).add_(EPSILON).rsqrt_())
            part_out.copy_((part * scales[-1]).mul_(weight))
        ctx.save_for_backward(rows, weight, torch.cat(scales))
        ctx.step = step
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight, scales = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(rows.shape)
        out, weight_grad = torch.empty_like(rows), torch.zeros_like(weight)
        split = (t.split(ctx.step) for t in (rows, grad, scales, out))
        for part, part_grad, scale, part_out in zip(*split, strict=True):
            normal = part * scale
            product = normal * part_grad
            weight_grad += product.sum(0)
            along = product.mul_(weight).mean(-1, keepdim=True)
            part_out.copy_(torch.addcmul(part_grad * weight, normal, along, value=-1, out=normal).mul_(scale))
        return out.view(shape), weight_grad


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Scales the vectors of x's last axis to a root mean square of one, times `weight`; keeps the dtype of x.

    weight: of the shape of x's last axis, or of its last axes.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnCPU.apply(x, weight)
    if weight.ndim == 1:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPSILON)
    return F.rms_norm(x, weight.shape[-1:], None, EPSILON) * weight.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)
