"""Formats: lengths, sizes and frame rates of the clips that one model makes, and the tokens that tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reelm.lm.vocabulary import duration_token, frame_rate_token, resolution_token


@dataclass(frozen=True)
class Format:
    """What a clip looks like from outside.

    frames: `1 + 4k`. size: height and width in pixels. fps: frames a second. weight: how many clips of it are trained
    on, relative to the other formats.
    """

    frames: int = 17
    size: tuple[int, int] = (64, 64)
    fps: float = 8.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        size = tuple(self.size) if isinstance(self.size, Sequence) else (self.size,)
        object.__setattr__(self, "size", size)
        values = (self.frames, *size, self.fps, self.weight)
        if len(size) != 2 or not all(isinstance(value, (int, float)) and value > 0 for value in values):
            raise ValueError(
                f"a format has frames, size=[height,width], fps and a weight above 0; got frames={self.frames}, "
                f"size={list(size)}, fps={self.fps}, weight={self.weight}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.frames, *self.size

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.size[0]} x {self.size[1]} at {self.fps:g} fps"


@dataclass(frozen=True)
class Formats:
    """Several formats of one model, told by tokens of size, frame rate and length (VideoPoet, arXiv:2312.14125, A.5.1).

    parts: the formats, the usual one first. The order of their sizes numbers the size tokens.
    """

    parts: tuple[Format, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Sequence) or isinstance(self.parts, str):
            raise ValueError(f"formats are a list such as [{{frames:17,size:[64,64],fps:8}}]; got {self.parts}")
        parts = tuple(_format(part) for part in self.parts)
        if not parts or len({(part.shape, part.fps) for part in parts}) < len(parts):
            raise ValueError(f"formats differ from each other, and there is one at least; got {list(map(str, parts))}")
        object.__setattr__(self, "parts", parts)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys(part.size for part in self.parts))

    def tokens(self, shape: tuple[int, int, int], fps: float, latents: int) -> list[int]:
        """Ids that tell a clip of this shape (frames, height, width) and `latents` latent frames: its size, its frame
        rate but for images, and its length. Raises ValueError for a size that is not among the formats."""
        if tuple(shape[1:]) not in self.sizes:
            known = ", ".join(f"{height} x {width}" for height, width in self.sizes)
            raise ValueError(f"this model makes clips of {known}; got {shape[1]} x {shape[2]}")
        rate = [frame_rate_token(fps)] if shape[0] > 1 else []
        return [resolution_token(self.sizes.index(tuple(shape[1:]))), *rate, duration_token(latents)]

    def fitting(self, frames: int | None, size: tuple[int, int] | None, fps: float | None) -> Format:
        """The format that a clip is made in: the shortest one that holds `frames`, else the longest.

        None: as in the usual format. Raises ValueError with the sizes and rates there are for another one.
        """
        usual = self.parts[0]
        size, fps = size or usual.size, fps or usual.fps
        fit = sorted(
            (part for part in self.parts if (part.size, part.fps) == (size, fps)), key=lambda part: part.frames
        )
        if not fit:
            known = dict.fromkeys(f"[{part.size[0]},{part.size[1]}] at fps={part.fps:g}" for part in self.parts)
            raise ValueError(
                f"this model makes clips of size={', '.join(known)}; got [{size[0]},{size[1]}] at fps={fps:g}"
            )
        if frames is None:
            return usual if usual in fit else fit[-1]
        return next((part for part in fit if part.frames >= frames), fit[-1])


def _format(part: Format | Mapping[str, Any]) -> Format:
    """A format from a configuration's mapping."""
    if isinstance(part, Format):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"a format is such as {{frames:17,size:[64,64],fps:8}}; got {part}")
    unknown = set(part) - set(Format.__dataclass_fields__)
    if unknown:
        raise ValueError(f"a format has frames, size, fps and weight, not {min(unknown)}")
    return Format(**part)
