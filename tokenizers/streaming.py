"""Clips and sounds of any length, encoded and decoded piece by piece in constant memory.

The result is that of the whole: between pieces, only what the causal convolutions will look back at is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from reelm.tokenizers.tokenizer import Tokenizer


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


def encode_stream(tokenizer: Tokenizer, signal: Iterable[Tensor], latent_frames: int = 4) -> Iterator[Tensor]:
    """Tokens, piece by piece along their axis 1, of a clip or sound that comes in pieces of any lengths.

    Args:
        tokenizer: a causal one (`MAGVIT2`, `SoundStream`). One that takes whole clips only gets the pieces joined.
        signal: pieces `(B, 3, T, H, W)` or `(B, C, N)` in [-1, 1]; together as long as the tokenizer takes, else the
            last piece raises ValueError.
        latent_frames: how many latents in time are made at once.
    """
    if not tokenizer.streams:
        yield tokenizer.encode(torch.cat(list(signal), 2))
        return
    first, step, past = tokenizer.length(latent_frames, True), tokenizer.length(latent_frames, False), {}
    for piece in recut(signal, first, step):
        yield tokenizer.encode(piece, past)


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[Tensor], latent_frames: int = 4) -> Iterator[Tensor]:
    """The clip or sound in [-1, 1], piece by piece, of tokens that come in pieces of any lengths along their axis 1."""
    if not tokenizer.streams:
        yield tokenizer.decode(torch.cat(list(tokens), 1))
        return
    past = {}
    for piece in recut((part.unsqueeze(1) for part in tokens), latent_frames, latent_frames):
        yield tokenizer.decode(piece.squeeze(1), past)
