"""Tasks in which whole frames are known: image to video, continuation, interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelm.data.clip import Clip
from reelm.tasks.task import Given, mask_video, random_int


@dataclass(frozen=True)
class KnownFrames:
    """The first `first` frames are known (one of several lengths, by chance) and the last `last`.

    `first=(1,)` is image to video, `(5, 9)` continuation, `(1,)` with `last=1` first-last interpolation. Lengths are
    `1 + 4k`, so that the known frames are a prefix of the clip's own tokens.
    """

    name: str
    first: tuple[int, ...] = (1,)
    last: int = 0
    marker: int = 0
    frames: int | None = None
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", tuple(self.first))  # a list of a configuration cannot be saved with a model

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        first = self.first[random_int(0, len(self.first) - 1, generator)]
        if first + self.last >= clip.frames:
            known = first + self.last
            raise ValueError(f"{self.name} knows {known} frames; a clip of {clip.frames} leaves none to make")
        known = torch.zeros(1, 1, clip.frames, 1, 1, dtype=torch.bool, device=clip.device)
        known[:, :, :first] = True
        known[:, :, clip.frames - self.last :] = True
        video, known = mask_video(clip, known)
        return Given((clip.frames, *clip.size), clip.captions, video, known, fps=clip.fps), clip
