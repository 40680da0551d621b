"""Tokens as points, for models that denoise them."""

from __future__ import annotations

import torch
from torch import Tensor

from reelm.tokenizers.tokenizer import VideoTokenizer


class LatentSpace:
    """The tokens of a video tokenizer as latents `(B, D, t, h, w)` float32, and back.

    A tokenizer without quantization has them already. The codes of another stand at their places among its quantized
    latents, and what is denoised goes to the nearest code ("analog bits", arXiv:2208.04202, where the quantizer is LFQ).

    Args:
        tokenizer: any whose quantizer finds its own codes again; ValueError for others.
    """

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        self.tokenizer = tokenizer
        self.channels: int = tokenizer.quantizer.dim
        self.continuous = tokenizer.vocabulary is None
        if not self.continuous:
            device = next(tokenizer.parameters()).device
            some = torch.arange(min(tokenizer.vocabulary, 256), device=device).view(1, -1, 1, 1)
            if not torch.equal(self.tokens(self.points(some)), some):
                raise ValueError(
                    f"the codes of {type(tokenizer.quantizer).__name__} are no points that can be denoised; "
                    "take a tokenizer with quantizer=continuous, or lfq"
                )

    @torch.no_grad()
    def points(self, tokens: Tensor) -> Tensor:
        """Latents of tokens as `tokenizer.encode` gives them."""
        return tokens.float().movedim(-1, 1) if self.continuous else self.tokenizer.quantizer.lookup(tokens)

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """The tokens that latents stand for."""
        return latents.movedim(1, -1) if self.continuous else self.tokenizer.quantizer(latents)[1]

    def encode(self, video: Tensor) -> Tensor:
        """`(B, 3, T, H, W)` in [-1, 1] to latents."""
        return self.points(self.tokenizer.encode(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""
        return self.tokenizer.decode(self.tokens(latents))
