"""Rotary positions (RoFormer, arXiv:2104.09864) over one axis or over time, row and column."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Rotary tables from positions, which are data.

    Args:
        dimension: size of a head; even.
        axes: 1 counts columns; 3 gives each of time, row and column its share of the dimensions.
        theta: the slowest pair turns about once in 2 pi theta places.
    """

    axis: Tensor
    frequency: Tensor

    def __init__(self, dimension: int, axes: int, theta: float) -> None:
        super().__init__()
        pairs = dimension // 2
        shares = [pairs] if axes == 1 else [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        axis = torch.cat([torch.full((share,), i) for i, share in enumerate(shares)])
        frequency = torch.cat([theta ** -(torch.arange(share) / share) for share in shares])
        self.register_buffer("axis", axis, persistent=False)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `(B, L, 1, D)` float32 of positions `(B, L, axes)`."""
        angles = positions.float()[..., self.axis] * self.frequency
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).unsqueeze(2), torch.cat([-sin, sin], -1).unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of `x (B, L, heads, D)`; `sin` has the minus of the first half in it."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
