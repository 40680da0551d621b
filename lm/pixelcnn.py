"""A masked convolutional network in the transformer's place (PixelCNN, arXiv:1601.06759 and 1606.05328)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelm.lm.cache import Cache
from reelm.lm.linear import Linear
from reelm.lm.norm import RMSNorm
from reelm.lm.sequence import Sequence


class MaskedConv(nn.Conv3d):
    """A convolution over time, rows and columns that sees what comes earlier in the raster, and its own place unless
    `strict`."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], strict: bool) -> None:
        super().__init__(inputs, outputs, kernel)
        order = torch.arange(kernel[0] * kernel[1] * kernel[2]).view(kernel)
        here = order[-1, kernel[1] // 2, kernel[2] // 2]
        self.register_buffer("mask", order < here if strict else order <= here, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        time, rows, columns = self.kernel_size
        x = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2, time - 1, 0))
        return F.conv3d(x, self.weight * self.mask, self.bias)


class PixelCNN(nn.Module):
    """Vectors in, vectors out, as `Transformer`.

    Each place of the grid is predicted from those before it in its neighbourhood, which grows with the depth. What is
    off the grid (text, conditions) counts by the mean of its vectors.

    Args:
        width: size of the vectors.
        depth: number of gated layers.
        kernel: sides in frames (this one and earlier ones), rows and columns, these odd.
    """

    cannot_grow = ("width", "kernel")
    raster = True  # what is predicted of a place depends on those earlier in the raster, in whichever order they stand

    def __init__(self, width: int = 64, depth: int = 6, kernel: tuple[int, int, int] = (2, 5, 5)) -> None:
        super().__init__()
        self.width, self.depth, self.kernel = width, depth, tuple(kernel)
        if len(self.kernel) != 3 or min(self.kernel) < 1 or self.kernel[1] % 2 == 0 or self.kernel[2] % 2 == 0:
            raise ValueError(f"kernel is frames, rows and columns, the last two odd; got {self.kernel}")
        self.first = MaskedConv(width, width, self.kernel, strict=True)
        self.gates = nn.ModuleList(MaskedConv(width, 2 * width, self.kernel, strict=False) for _ in range(depth))
        self.texts = nn.ModuleList(Linear(width, 2 * width) for _ in range(depth))
        self.outs = nn.ModuleList(nn.Conv3d(width, width, 1) for _ in range(depth))
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor, sequence: Sequence, cache: Cache | None = None) -> Tensor:
        """Hidden states `(B, L, width)`; those of column i predict the token of column i + 1 (`Transformer.forward`).

        All rows have the positions of the first. A cache saves no work here.
        """
        new, places = x.shape[1], sequence.positions[0]
        if cache is not None:
            x = cache.append(0, x[:, None], x[:, None])[0][:, 0]
            places = cache.places = torch.cat([cache.places[: cache.length], places])
            cache.advance(new)
        asked = torch.cat([places[1:], sequence.next_positions[0, -1:]])
        on, predicts = places[:, 0] >= 0, asked[:, 0] >= 0
        size = torch.cat([places, asked]).amax(0).clamp_min(0) + 1
        step = torch.stack([size[1] * size[2], size[2], torch.ones_like(size[2])])
        z = x.new_zeros(len(x), int(size.prod()), self.width)
        z[:, (places[on] * step).sum(-1)] = x[:, on]
        text = x[:, ~on].mean(1) if not bool(on.all()) else x.new_zeros(len(x), self.width)
        z = self.first(z.transpose(1, 2).unflatten(2, tuple(size.tolist())))
        for gate, condition, out in zip(self.gates, self.texts, self.outs, strict=True):
            value, openness = (gate(z) + condition(text)[..., None, None, None]).chunk(2, 1)
            z = z + out(value.tanh() * openness.sigmoid())
        hidden = x.new_zeros(x.shape)
        hidden[:, predicts] = z.flatten(2)[:, :, (asked[predicts] * step).sum(-1)].transpose(1, 2).to(x.dtype)
        return self.norm(hidden[:, -new:])

    def new_cache(self, batch: int, columns: int, dtype: torch.dtype | None = None) -> Cache:
        """Room for the vectors of `columns` columns of `batch` rows."""
        weight = self.norm.weight
        return Cache(1, (batch, 1, columns, self.width), dtype or weight.dtype, weight.device)
