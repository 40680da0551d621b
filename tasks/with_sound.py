"""Tasks of video and sound: either from the other, both from a prompt, both continued (VideoPoet, appendix A.5.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reelm.data.clip import Clip
from reelm.tasks.task import Given, mask_video, one_of

KINDS = ("video", "audio")


@dataclass(frozen=True)
class WithSound:
    """Some of a clip's video and sound is told as a whole, the rest is to be made.

    told: what is given as a whole, of "video" and "audio". asks: what is to be made, the video first. first: how many
    leading frames of what is to be made are known, with their sound; one by chance of several numbers that leave some
    of the clip to make.
    """

    name: str
    told: tuple[str, ...] = ()
    asks: tuple[str, ...] = KINDS
    first: tuple[int, ...] = (0,)
    prompted: bool = True
    marker: int = 5
    frames: int | None = None
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("told", "asks", "first"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.asks or {*self.told, *self.asks} - {*KINDS} or {*self.told} & {*self.asks}:
            raise ValueError(
                f"{self.name} tells some of {', '.join(KINDS)} and asks for others; got {self.told}, {self.asks}"
            )

    @property
    def audio(self) -> bool:
        """Whether the task needs the clips' sound."""
        return True

    @property
    def from_prompt(self) -> bool:
        """Whether a prompt is enough."""
        return self.prompted and not self.told and 0 in self.first

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]:
        if clip.audio is None:
            raise ValueError(f"{self.name} needs the sound of clips; the data source gave none")
        if min(self.first) >= clip.frames:
            raise ValueError(f"{self.name} knows {min(self.first)} frames; a clip of {clip.frames} leaves none to make")
        first = one_of([n for n in self.first if n < clip.frames], generator)
        video = known = audio = None
        seen = clip.frames if "video" in self.told else first
        if seen:
            known = torch.arange(clip.frames, device=clip.device)[:, None, None] < seen
            video, known = mask_video(clip, known[None, None])
        if "audio" in self.told:
            audio = clip.audio
        elif first:
            audio = clip.audio[..., : round(first / clip.fps * clip.audio_rate)]
        captions = clip.captions if self.prompted else ("",) * len(clip)
        given = Given((clip.frames, *clip.size), captions, video, known, fps=clip.fps, asks=self.asks)
        return given.replace(audio=audio, audio_rate=clip.audio_rate), clip
