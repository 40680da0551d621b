"""Decoding that goes on in smaller parts where memory runs out."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from reelm.tokenizers.memory import out_of_memory
from reelm.tokenizers.streaming import decode_stream
from reelm.tokenizers.tiling import Tiled
from reelm.tokenizers.tokenizer import Tokenizer, VideoTokenizer


def decode_within_memory(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """What `tokenizer.decode` makes of tokens `(B, t, ...)`, with as little memory as need be.

    Where they do not fit as a whole they are decoded sample by sample, then piece by piece in time, which changes
    nothing, and frames at last in tiles, with a warning, as their seams may show. MemoryError, of one line, where the
    smallest are too large.
    """
    made = _tried(tokenizer, tokens)
    if made is None and len(tokens) > 1:
        return torch.cat([decode_within_memory(tokenizer, sample) for sample in tokens.split(1)])
    if made is None and isinstance(tokenizer, VideoTokenizer):
        tiled = Tiled(tokenizer, latent_frames=1)
        made = _tried(tiled, tokens)
        if made is not None and tiled.used > 1:
            warnings.warn(f"memory ran out: decoded in {tiled.used} tiles, whose seams may show", stacklevel=2)
    elif made is None:
        latents = tokens.shape[1]
        while made is None and latents > 1:
            latents = -(-latents // 2)
            made = _tried(tokenizer, tokens, latents)
    if made is None:
        raise MemoryError(
            f"memory ran out in decoding {' x '.join(map(str, tokens.shape[1:]))} tokens, in the smallest parts too; "
            "free memory, or ask for less at once"
        )
    return made


def _tried(tokenizer: Tokenizer, tokens: Tensor, latents: int | None = None) -> Tensor | None:
    """The signal, decoded so many latents in time at once; None where memory runs out."""
    try:
        if latents is None:
            return tokenizer.decode(tokens)
        return torch.cat(list(decode_stream(tokenizer, [tokens], latents)), 2)
    except Exception as error:
        if not out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    return None
