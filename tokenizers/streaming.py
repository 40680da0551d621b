"""Clips of any length, encoded and decoded piece by piece in constant memory.

The result is that of the whole clip: between pieces, only the frames that the causal convolutions will look back at are
kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def recut(pieces: Iterable[Tensor], first: int, step: int) -> Iterator[Tensor]:
    """Pieces `(B, C, T, ...)` of any length as pieces of `first` and then of `step` frames; the last may be shorter."""
    waiting: Tensor | None = None
    size = first
    for piece in pieces:
        waiting = piece if waiting is None else torch.cat([waiting, piece], 2)
        while waiting.shape[2] >= size:
            yield waiting[:, :, :size]
            waiting, size = waiting[:, :, size:], step
    if waiting is not None and waiting.shape[2]:
        yield waiting


def encode_stream(tokenizer: nn.Module, video: Iterable[Tensor], latent_frames: int = 4) -> Iterator[Tensor]:
    """Tokens, piece by piece along their axis 1, of a clip that comes in pieces `(B, 3, T, H, W)` of any lengths.

    Args:
        tokenizer: a causal one (`MAGVIT2`). One that takes whole clips only gets the pieces joined.
        video: pieces in [-1, 1]; together `1 + k * compression` frames, else the last piece raises ValueError.
        latent_frames: how many latent frames are made at a time.
    """
    if not tokenizer.streams:
        yield tokenizer.encode(torch.cat(list(video), 2))
        return
    step, past = tokenizer.compression[0], {}
    for piece in recut(video, 1 + (latent_frames - 1) * step, latent_frames * step):
        yield tokenizer.encode(piece, past)


def decode_stream(tokenizer: nn.Module, tokens: Iterable[Tensor], latent_frames: int = 4) -> Iterator[Tensor]:
    """Pixels `(B, 3, T, H, W)` in [-1, 1], piece by piece, of tokens that come in pieces of any lengths."""
    if not tokenizer.streams:
        yield tokenizer.decode(torch.cat(list(tokens), 1))
        return
    past = {}
    for piece in recut((part.unsqueeze(1) for part in tokens), latent_frames, latent_frames):
        yield tokenizer.decode(piece.squeeze(1), past)
