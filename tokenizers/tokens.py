"""`Tokens`: one modality after its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """A grid of discrete tokens.

    ids: `(B, T, H, W)` int64, each in [0, vocabulary).
    """

    ids: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 4:
            raise ValueError(f"token ids are (B, T, H, W); got {tuple(self.ids.shape)}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Time, rows and columns of the grid."""
        return tuple(self.ids.shape[1:])

    def flat(self) -> Tensor:
        """Ids in raster order (time, row, column): `(B, T*H*W)`."""
        return self.ids.flatten(1)

    @staticmethod
    def positions(grid: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
        """(time, row, column) of each token in raster order: `(T*H*W, 3)` int64."""
        axes = [torch.arange(n, device=device) for n in grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
