"""Linear layers that stay fast when a CPU decodes."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # rows, up to which CPU libraries may do badly: they read the weights anew for each, or pack them first
GAIN = 1.3  # from this speed-up on the other way is taken, so that chance does not choose between two that are alike
TRIES = 5


def _weights_left(x: Tensor, weight: Tensor) -> Tensor:
    """`x (rows, in)` times `weight (out, in)`, transposed, as a product of the weights with a few columns. A single row
    is doubled: libraries hand a single column to a routine of its own."""
    rows = len(x)
    return torch.mm(weight, (x if rows > 1 else x.repeat(2, 1)).t()).t()[:rows]


@functools.cache
def _left_is_faster(rows: int, outputs: int, inputs: int, threads: int) -> bool:
    """Whether this machine is faster with the weights as the left factor; found by trying, in a few products.

    Which one is depends on processor and library: of two machines with AVX-512 it took a third of the time on one and
    twice the time on the other. Processes on one machine may choose differently too, which changes how results round.
    """
    x, weight = torch.ones(rows, inputs, device="cpu"), torch.ones(outputs, inputs, device="cpu")
    best = dict.fromkeys((F.linear, _weights_left), float("inf"))
    for _ in range(TRIES):
        for product in best:
            started = time.perf_counter()
            product(x, weight)
            best[product] = min(best[product], time.perf_counter() - started)
    return best[_weights_left] * GAIN < best[F.linear]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x (..., in)` times `weight (out, in)`, transposed: `(..., out)`.

    A few float32 rows on a CPU (a prompt and its guidance) are multiplied in the way that is fastest there. A weight
    with a lighter copy (precision.py) is multiplied by that, where nothing is learned.
    """
    if torch.is_grad_enabled():
        return F.linear(x, weight)
    light = getattr(weight, "light", None)
    return in_full(x, weight) if light is None else light(x)


def in_full(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` with the weights themselves, where nothing is learned."""
    rows = x.numel() // x.shape[-1]
    few = 0 < rows <= FEW and x.dtype is torch.float32 and x.device.type == "cpu"
    if not few or torch.compiler.is_compiling() or not _left_is_faster(rows, *weight.shape, torch.get_num_threads()):
        return F.linear(x, weight)
    return _weights_left(x.reshape(rows, -1), weight).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
