"""Stylization: the depth and motion of a clip are given, its looks come from the prompt (VideoPoet, appendix A.5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelm.data.clip import Clip
from reelm.data.controls import control_image
from reelm.tasks.task import Given


@dataclass(frozen=True)
class Stylization:
    """Depth and optical flow, packed into the three channels of a video, are the condition."""

    name: str = "stylization"
    marker: int = 3
    frames: int | None = None
    controls: tuple[str, ...] = ("depth", "flow")

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        missing = [name for name in self.controls if name not in clip.controls]
        if missing:
            raise ValueError(f"stylization needs {' and '.join(missing)} of the clip; the data source gave none")
        condition = control_image(clip.controls["depth"], clip.controls["flow"])
        return Given((clip.frames, *clip.size), clip.captions, condition=condition, fps=clip.fps), clip
