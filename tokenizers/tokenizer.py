"""What all tokenizers of video and of sound have in common."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

Triple = tuple[int, int, int]
Past = dict[nn.Module, Tensor]  # the last frames that each causal part of a stream has seen; empty where it begins


def begins(part: nn.Module, past: Past | None, x: Tensor) -> bool:
    """Whether `x` is where the clip begins for a part that remembers nothing else; `past` is told that it has begun."""
    begun = past is not None and part in past
    if past is not None:
        past[part] = x.new_empty(0)  # a view would keep the whole piece
    return not begun


def in_half_precision(latents: Tensor) -> Tensor:
    """Continuous tokens rounded to the 16 bits a number in which they are stored; ValueError where they do not fit."""
    half = latents.half()
    if not half.isfinite().all():
        raise ValueError("the latents do not fit 16 bits a number: the video or the tokenizer's weights are no good")
    return half.to(latents.dtype)


class Tokenizer(nn.Module):
    """A causal network between a signal, whose axis 2 is time, and latents, and a quantizer between latents and tokens.

    Tokens are ids int64 or, where `vocabulary` is None, latents float32.

    A stream is a signal given in pieces that are each made of whole latents (`streaming.py` cuts them); `past` is what
    it remembers: an empty dictionary with the first piece and the same one with all others.

    Subclasses set `quantizer` and `compression` and give `length`, `encode_latents` and `decode_latents`.
    """

    quantizer: nn.Module
    streams = True  # False: takes whole signals only; a stream is then joined before it is encoded or decoded

    def length(self, latents: int, begins: bool) -> int:
        """How much of a signal makes that many latents in time, where it begins or later."""
        raise NotImplementedError

    def encode_latents(self, signal: Tensor, past: Past | None = None) -> Tensor:
        """A signal in [-1, 1] to latents before quantization."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """Quantized latents to the signal, not clipped."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int | None:
        """Number of codes; None where tokens are continuous."""
        return self.quantizer.vocabulary

    @torch.no_grad()
    def encode(self, signal: Tensor, past: Past | None = None) -> Tensor:
        """A signal in [-1, 1] to tokens, always in the precision of the weights: tokens that are made within autocast
        are those that are stored, and those of generation."""
        self._whole(past)
        with torch.autocast(signal.device.type, enabled=False):
            return self.quantizer(self.encode_latents(signal, past))[1]

    @torch.no_grad()
    def decode(self, tokens: Tensor, past: Past | None = None) -> Tensor:
        """Tokens to a signal in [-1, 1]."""
        self._whole(past)
        return self.decode_latents(self.quantizer.lookup(tokens), past).float().clamp(-1, 1)

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction (not clipped), tokens, and the quantizer's loss terms."""
        quantized, tokens, losses = self.quantizer(self.encode_latents(signal))
        return self.decode_latents(quantized), tokens, losses

    def _whole(self, past: Past | None) -> None:
        if past is not None and not self.streams:
            raise ValueError(f"{type(self).__name__} takes whole clips, no pieces of a stream")

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.parameters(), self.buffers())).device


class VideoTokenizer(Tokenizer):
    """A tokenizer of videos `(B, 3, T, H, W)`, with latents `(B, quantizer.inputs, t, h, w)` and tokens `(B, t, h, w)`,
    or `(B, t, h, w, D)` where they are continuous.

    Frame 0 is a latent frame of its own, and each `compression[0]` frames after it are one more, so `1 + t * k` frames
    make `1 + k`; `compression` are the frames, rows and columns of a latent.
    """

    compression: Triple

    def length(self, latents: int, begins: bool) -> int:
        return 1 + (latents - 1) * self.compression[0] if begins else latents * self.compression[0]

    def reach(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Rows and columns of latents, to each side, that hold what a latent is made of, and of latents that a pixel
        is made of; norms over whole frames aside. None where there is no such bound."""
        return None

    def grid(self, frames: int, height: int, width: int) -> Triple:
        """Token grid of a clip; raises ValueError where the clip does not fit the compression."""
        t, h, w = self.compression
        if (frames - 1) % t or height % h or width % w:
            raise ValueError(
                f"a clip of {frames} frames of {height} x {width} does not fit this tokenizer: "
                f"it takes 1 + {t}k frames of multiples of {h} x {w}"
            )
        return 1 + (frames - 1) // t, height // h, width // w

    def check(self, video: Tensor, past: Past | None) -> None:
        """ValueError where a clip, or a piece of a stream, does not fit the compression."""
        self.grid(video.shape[2] + (1 if past else 0), *video.shape[3:])
