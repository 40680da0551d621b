"""Tokens as points, for models that denoise them."""

from __future__ import annotations

import torch
from torch import Tensor

from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.within_memory import decode_within_memory


class LatentSpace:
    """The tokens of a video tokenizer as latents `(B, D, t, h, w)` float32, and back.

    A tokenizer without quantization has them already, of unit variance. The codes of another stand at their places
    among its quantized latents, shifted and scaled so that all codes together have unit variance, and what is denoised
    goes to the nearest code ("analog bits", arXiv:2208.04202, where the quantizer is LFQ).

    Args:
        tokenizer: any whose quantizer finds its own codes again; ValueError for others.
    """

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        self.tokenizer, quantizer = tokenizer, tokenizer.quantizer
        self.channels: int = quantizer.dim
        self.continuous = tokenizer.vocabulary is None
        if self.continuous:
            return
        device = tokenizer.device
        # the same on every machine, and no channel stands still as it could with even steps
        some = torch.arange(1 << 12, device=device) * 2_654_435_761 % tokenizer.vocabulary
        codes = quantizer.lookup(some.view(1, -1, 1, 1))
        self._nearest = getattr(quantizer, "nearest", None) or (lambda latents: quantizer(latents)[1])
        deviation, mean = torch.std_mean(codes, (0, 2, 3, 4), correction=0, keepdim=True)
        self._deviation, self._mean = deviation.clamp_min(1e-6), mean
        if not torch.equal(self._nearest(codes).flatten(), some):
            raise ValueError(
                f"the codes of {type(quantizer).__name__} are no points that can be denoised; "
                "take a tokenizer with quantizer=continuous, lfq or fsq"
            )

    @torch.no_grad()
    def points(self, tokens: Tensor) -> Tensor:
        """Latents of tokens as `tokenizer.encode` gives them."""
        if self.continuous:
            return tokens.float().movedim(-1, 1)
        codes = self.tokenizer.quantizer.lookup(tokens)
        return (codes - self._mean.to(codes)) / self._deviation.to(codes)

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """The tokens that latents stand for."""
        if self.continuous:
            return latents.movedim(1, -1)
        return self._nearest(latents * self._deviation.to(latents) + self._mean.to(latents))

    def encode(self, video: Tensor) -> Tensor:
        """`(B, 3, T, H, W)` in [-1, 1] to latents."""
        return self.points(self.tokenizer.encode(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""
        return decode_within_memory(self.tokenizer, self.tokens(latents))
