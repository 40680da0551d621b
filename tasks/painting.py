"""Inpainting and outpainting: part of each frame is known (COMMIT-type conditions, MAGVIT appendix B.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelm.data.clip import Clip
from reelm.tasks.task import Given, mask_video, random_int


@dataclass(frozen=True)
class Painting:
    """A rectangle with sides of `smallest` to `largest` of the frame's, the same in all frames and samples of a batch.

    `inside=True` hides the rectangle (inpainting), `inside=False` hides all but it (outpainting).
    """

    name: str
    inside: bool
    marker: int
    smallest: float = 0.3
    largest: float = 0.6
    frames: int | None = None
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest < 1:
            raise ValueError(
                f"{self.name}'s rectangle needs 0 < smallest <= largest < 1; got {self.smallest} and {self.largest}"
            )

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        height, width = clip.size
        box = torch.zeros(1, 1, 1, height, width, dtype=torch.bool, device=clip.device)
        h, w = (random_int(round(self.smallest * n), round(self.largest * n), generator) for n in (height, width))
        top, left = random_int(0, height - h, generator), random_int(0, width - w, generator)
        box[..., top : top + h, left : left + w] = True
        video, known = mask_video(clip, ~box if self.inside else box)
        return Given((clip.frames, height, width), clip.captions, video, known, fps=clip.fps), clip
