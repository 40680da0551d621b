"""Making a clip or an image from a prompt, or from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reelm.data.clip import Clip
from reelm.tasks.task import Given


@dataclass(frozen=True)
class Generation:
    """Text to video; with `frames=1` text to image; with `prompted=False` unconditional."""

    name: str = "t2v"
    frames: int | None = None
    prompted: bool = True
    marker: int = 0
    controls: tuple[str, ...] = ()
    from_prompt: ClassVar[bool] = True

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        captions = clip.captions if self.prompted else ("",) * len(clip)
        return Given((clip.frames, *clip.size), captions, fps=clip.fps), clip
