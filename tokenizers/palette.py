"""Pixels as tokens: each takes the nearest colour of a learned palette (iGPT, Chen et al. 2020, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reelm.tokenizers.tokenizer import Past, VideoTokenizer

PIXELS = 1 << 16  # whose distances to all colours are computed together
SOME = 1 << 12  # pixels of a batch that colours are drawn to


class Colours(nn.Module):
    """A table of colours. Trained on the squared error of what it shows, each moves to the mean of the pixels that take
    it, as in k-means.

    Args:
        vocabulary: number of colours; iGPT has 512.
    """

    dim = 3

    def __init__(self, vocabulary: int = 512) -> None:
        super().__init__()
        if vocabulary < 1:
            raise ValueError(f"a palette has 1 colour or more; got {vocabulary}")
        self.vocabulary = vocabulary
        self.table = nn.Parameter(torch.rand(vocabulary, 3) * 2 - 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Colours `(B, 3, T, H, W)` to the nearest of the palette, their ids `(B, T, H, W)`, and in training how far
        each colour is from any pixel: what brings those that nobody takes to where pixels are."""
        flat = z.detach().movedim(1, -1).flatten(0, -2).float()
        with torch.no_grad():
            ids = torch.cat([torch.cdist(part, self.table).argmin(-1) for part in flat.split(PIXELS)])
        ids, losses = ids.unflatten(0, (z.shape[0], *z.shape[2:])), {}
        if self.training:
            some = flat[torch.randperm(len(flat), device=flat.device)[:SOME]]
            nearest = torch.cdist(self.table.detach(), some).argmin(-1)
            losses["commitment"] = (self.table - some[nearest]).square().mean()
        return self.lookup(ids), ids, losses

    def lookup(self, ids: Tensor) -> Tensor:
        return self.table[ids].movedim(-1, 1)


class Palette(VideoTokenizer):
    """One token a pixel, in the order of the raster.

    Args:
        quantizer: the colours.
    """

    compression = (1, 1, 1)

    def __init__(self, quantizer: Colours) -> None:
        super().__init__()
        self.quantizer = quantizer

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        return video

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        return latents
