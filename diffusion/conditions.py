"""`Conditions`: what a denoiser is told, in one form for every task."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditions:
    """What is known about a batch of B clips of t x h x w latents of D channels, each made of S frames. What is None
    is not known.

    text: `(B, N)` int64 word pieces, or `(B, N, W)` vectors.
    text_mask: `(B, N)` bool: which of them count.
    known: `(B, D, t, h, w)` latents of the known pixels, the others being grey; 0 where nothing is known.
    shares: `(B, S, t, h, w)` in [0, 1]: which share of the pixels is known, for each frame of a latent.
    kept: `(B, t)` bool: latent frames of the clip itself, which are neither noised nor made.
    control: `(B, D, t, h, w)` latents of a video that says what to make without being part of it.
    fps: `(B,)` frames a second.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    known: Tensor | None = None
    shares: Tensor | None = None
    kept: Tensor | None = None
    control: Tensor | None = None
    fps: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.text is None) != (self.text_mask is None):
            raise ValueError("text comes with a mask of what counts of it: give text and text_mask, or neither")
        if self.kept is not None and self.known is None:
            raise ValueError("latent frames to keep are those of known; give known with kept")

    def replace(self, **changes) -> Conditions:
        return replace(self, **changes)

    def without_text(self) -> Conditions:
        """The same with all texts left out."""
        return self if self.text_mask is None else self.replace(text_mask=torch.zeros_like(self.text_mask))

    @property
    def prompted(self) -> bool:
        """Whether any text counts."""
        return self.text_mask is not None and bool(self.text_mask.any())

    @staticmethod
    def cat(parts: list[Conditions]) -> Conditions:
        """One batch from several of which the same is known."""
        values = {}
        for name in (f.name for f in fields(Conditions)):
            each = [getattr(part, name) for part in parts]
            absent = [value is None for value in each]
            if any(absent) and not all(absent):
                raise ValueError(f"either all conditions of one batch have {name} or none has")
            values[name] = None if any(absent) else torch.cat(each)
        return Conditions(**values)
