"""Layers of denoising transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int, int]
Rotation = tuple[Tensor, Tensor]


def turns(grid: Grid, size: int, theta: float, device: torch.device) -> Tensor:
    """Angles `(t, h, w, size / 2)` float32 of rotary positions (arXiv:2104.09864): each of time, row and column has
    its share of the pairs, and the slowest pair of an axis turns about once in 2 pi theta places."""
    pairs = size // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    parts = []
    for axis, (places, share) in enumerate(zip(grid, shares, strict=True)):
        frequency = theta ** -(torch.arange(share, device=device) / max(share, 1))
        angles = torch.arange(places, device=device)[:, None] * frequency
        shape = [1, 1, 1, share]
        shape[axis] = places
        parts.append(angles.view(shape).expand(*grid, share))
    return torch.cat(parts, -1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the pairs (i, i + size / 2) of `x (B, heads, L, size)` by cosines and sines `(L, size / 2)`."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Attention(nn.Module):
    """Attention of vectors to each other, or to other vectors, with normalised queries and keys.

    Args:
        width: size of the vectors. heads: their number; each has a part of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.query_gain = nn.Parameter(torch.ones(width // heads))
        self.key_gain = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, others: Tensor | None = None, rotation: Rotation | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """`x (B, L, width)` looks at itself or at `others (B, N, width)`; mask `(B, 1, 1, N)` bool: at which."""
        others = x if others is None else others
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(others).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.rms_norm(q, q.shape[-1:], self.query_gain.to(q.dtype))
        k = F.rms_norm(k, k.shape[-1:], self.key_gain.to(k.dtype))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))


class Scalar(nn.Module):
    """Vectors of numbers: sines and cosines of them (arXiv:2006.11239, appendix B), then two layers.

    Args:
        width: size of the vectors.
        scale: numbers are multiplied by it first; the sines' periods run from 2 pi to 2 pi times 10,000.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale, self.half = scale, 64
        self.layers = nn.Sequential(nn.Linear(2 * self.half, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers `(...)` to `(..., width)`."""
        steps = torch.arange(self.half, device=numbers.device) / self.half
        angles = numbers.float()[..., None] * self.scale * torch.exp(-math.log(10_000) * steps)
        return self.layers(torch.cat([angles.cos(), angles.sin()], -1))


class TextBlock(nn.Module):
    """A pre-norm transformer block over the words of a text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), MLP(width, 4 * width)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), rotation=rotation, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class Text(nn.Module):
    """Text as vectors to look at: those that count, and one learned vector that is there without a text as well.

    Args:
        width: size of the vectors made.
        heads: of the blocks that read the words together. depth: number of these blocks.
        pieces: number of word pieces, for text that comes as their numbers; 0: it comes as vectors.
        inputs: size of these vectors.
    """

    def __init__(self, width: int, heads: int, depth: int, pieces: int, inputs: int) -> None:
        super().__init__()
        if bool(pieces) == bool(inputs):
            raise ValueError(f"text comes as word pieces or as vectors; got {pieces} pieces and vectors of {inputs}")
        self.words = nn.Embedding(pieces, width) if pieces else nn.Linear(inputs, width)
        if pieces:
            nn.init.normal_(self.words.weight, std=0.5)
        self.nothing = nn.Parameter(torch.randn(width) * 0.5)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.width, self.head_width = width, width // heads

    def forward(self, text: Tensor | None, counts: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Vectors `(B, 1 + N, width)` and which of them count `(B, 1, 1, 1 + N)`."""
        vectors = self.nothing.expand(batch, 1, -1)
        mask = torch.ones(batch, 1, dtype=torch.bool, device=vectors.device)
        if text is not None:
            if text.is_floating_point() == isinstance(self.words, nn.Embedding):
                raise ValueError("the denoiser was made for text of the other kind: word pieces or vectors")
            vectors = torch.cat([vectors, self.words(text).to(vectors.dtype)], 1)
            mask = torch.cat([mask, counts], 1)
        mask = mask[:, None, None]
        angles = turns((vectors.shape[1], 1, 1), self.head_width, 100.0, vectors.device).flatten(0, 2)
        for block in self.blocks:
            vectors = block(vectors, (angles.cos(), angles.sin()), mask)
        return self.norm(vectors), mask
