"""Tasks in which whole frames are known: image to video, continuation both ways, interpolation, connection,
key frames, loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.tasks.task import Given, check_order, mask_video, one_of


def known_ends(clip: Clip, first: int, last: int, device: torch.device) -> Given:
    """What is told where the first and the last frames of a clip are known; `device`: where that is noted."""
    known = torch.zeros(1, 1, clip.frames, 1, 1, dtype=torch.bool, device=device)
    known[:, :, :first] = True
    known[:, :, clip.frames - last :] = True
    video, known = mask_video(clip, known)
    return Given((clip.frames, *clip.size), clip.captions, video, known, fps=clip.fps)


@dataclass(frozen=True)
class KnownFrames:
    """The first frames are known, the last ones, or both: of several lengths each, one by chance of those that leave
    some of the clip to make.

    `first=(1,)` is image to video, `(5, 9)` continuation, `(1,)` with `last=1` first-last interpolation, `(0,)` with
    `last=(5, 9)` backward continuation, `(5,)` with `last=5` connects two clips. Lengths are `1 + 4k`, so that the
    first known frames are a prefix of the clip's own tokens, and the last ones a clip of whole latent frames.

    order: in which a language model makes latent frames (`task.ORDERS`); other than forward for attention that may look
        ahead in time.
    """

    name: str
    first: tuple[int, ...] = (1,)
    last: int | tuple[int, ...] = 0
    marker: int = 0
    frames: int | None = None
    controls: tuple[str, ...] = ()
    order: str = "forward"

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", tuple(self.first))  # a list of a configuration cannot be saved with a model
        if not isinstance(self.last, int):
            object.__setattr__(self, "last", tuple(self.last))
        check_order(self.name, self.order)

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        ends = self.last if isinstance(self.last, tuple) else (self.last,)
        least = min(self.first) + min(ends)
        if least >= clip.frames:
            raise ValueError(f"{self.name} knows {least} frames; a clip of {clip.frames} leaves none to make")
        first = one_of([n for n in self.first if n + min(ends) < clip.frames], generator)
        last = one_of([n for n in ends if first + n < clip.frames], generator) if len(ends) > 1 else ends[0]
        return known_ends(clip, first, last, clip.device).replace(order=self.order), clip


@dataclass(frozen=True)
class KeyFrames:
    """Every second frame is known, the first one among them (CogVideo, arXiv:2205.15868, section 3.1). Told at twice
    the rate of what is known, those between are made."""

    name: str = "key_frames"
    marker: int = 0
    frames: int | None = None
    controls: tuple[str, ...] = ()

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        if clip.frames < 3:
            raise ValueError(f"{self.name} needs clips of 3 frames or more; got {clip.frames}")
        known = torch.zeros(1, 1, clip.frames, 1, 1, dtype=torch.bool, device=clip.device)
        known[:, :, 0 : 2 * ((clip.frames - 1) // 2) + 1 : 2] = True
        video, known = mask_video(clip, known)
        return Given((clip.frames, *clip.size), clip.captions, video, known, fps=clip.fps), clip


@dataclass(frozen=True)
class Loop:
    """A clip that ends with the frame it begins with, which is told at both ends.

    Few clips do: those that are trained on are the first halves of clips, played forth and back. Their captions do not
    say so, so the task has a token of its own.
    """

    name: str = "loop"
    marker: int = 6
    frames: int | None = None
    controls: tuple[str, ...] = ()
    order: str = "forward"

    def __post_init__(self) -> None:
        check_order(self.name, self.order)

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        if clip.frames < 3:
            raise ValueError(f"{self.name} needs clips of 3 frames or more; got {clip.frames}")
        target = clip.replace(video=forth_and_back(clip.video), tokens=None, audio=None, controls={})
        return known_ends(target, 1, 1, clip.device).replace(order=self.order), target


def forth_and_back(video: Tensor) -> Tensor:
    """`(B, 3, T, H, W)`: the first half, and then the same backwards."""
    there = torch.arange(video.shape[2], device=video.device)
    return video[:, :, torch.minimum(there, there.flip(0))]
