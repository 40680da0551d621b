"""Keys and values of the columns that were already seen."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """Room for `columns` columns in each layer, made once and filled from the left.

    Args:
        layers: number of layers.
        shape: `(B, kv_heads, columns, D)` of the keys, and of the values, of one layer.
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        # zeros: where a mask hides columns that were never written (compiled.py), what is there must be finite
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.columns = shape[2]
        self.length = 0
        self.aside = 0  # columns that blocks attend to apart from the sequence, and what each is told of them
        self.told: list[tuple[Tensor, Tensor]] = []
        self.places = torch.empty(
            0, 3, dtype=torch.long, device=device
        )  # of the columns, where attention asks for them

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new columns `(B, kv_heads, L, D)` of one layer; returns all columns up to and with them."""
        start, stop = self.filled, self.filled + keys.shape[2]
        if stop > self.columns:
            raise ValueError(f"the cache has room for {self.columns} columns; {stop} are needed")
        kept = self.keys[layer], self.values[layer]
        for old, new in zip(kept, (keys, values), strict=True):
            old[:, :, start:stop] = new
        return kept[0][:, :, :stop], kept[1][:, :, :stop]

    @property
    def filled(self) -> int:
        """Columns that keys and values are kept of."""
        return max(self.length - self.aside, 0)

    def advance(self, columns: int) -> None:
        """Counts the columns that all layers have now written."""
        self.length += columns

    def rewind(self, length: int) -> None:
        """Forgets all columns from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length} columns; the cache holds {self.length}")
        self.length = length
