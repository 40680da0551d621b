"""The Zoetrope world as a dataset of clips, rendered when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reelm.data.clip import Clip
from reelm.data.zoetrope.captions import caption
from reelm.data.zoetrope.render import render
from reelm.data.zoetrope.scene import SPLITS, Scene, sample_scene


class Zoetrope(Dataset[Clip]):
    """Clips of one split, each a pure function of `(seed, split, index)`.

    size: pixels, one number or (height, width). captions: "full", "short", or "mixed" (either, drawn by index).
    """

    def __init__(
        self,
        split: str = "train",
        size: int | tuple[int, int] = 64,
        frames: int = 17,
        fps: float = 8.0,
        seed: int = 0,
        length: int = 1_000_000,
        captions: Literal["mixed", "full", "short"] = "mixed",
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if captions not in ("mixed", "full", "short"):
            raise ValueError(f"unknown kind of captions {captions!r}: choose mixed, full or short")
        self.split, self.frames, self.fps = split, frames, fps
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.seed, self.length, self.captions = seed, length, captions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        return self.get(index)

    def scene(self, index: int, frames: int | None = None) -> Scene:
        """The scene of a clip; one frame gives a still scene."""
        frames = frames or self.frames
        if frames == 1:
            return sample_scene(self.seed, self.split, self._checked(index), still=True)
        return sample_scene(self.seed, self.split, self._checked(index), seconds=frames / self.fps)

    def caption(self, index: int, frames: int | None = None) -> str:
        """The caption of a clip, without drawing it."""
        return self._caption(self.scene(index, frames), index, frames or self.frames)

    def get(self, index: int, frames: int | None = None) -> Clip:
        """A batch of one clip of `frames` frames (default: the dataset's own); 1 is an image."""
        frames = frames or self.frames
        scene = self.scene(index, frames)
        pixels = render(scene, frames, self.size, self.fps)
        return Clip(
            video=_to_video(pixels),
            fps=self.fps,
            captions=(self._caption(scene, index, frames),),
            keys=(f"zoetrope/{self.split}/{index}",),
        )

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"Zoetrope has the indices 0 to {self.length - 1}; got {index}")
        return index

    def _caption(self, scene: Scene, index: int, frames: int) -> str:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(self.split), index, 2))
        rng = np.random.Generator(np.random.PCG64(sequence))
        full = rng.random() < 0.5 if self.captions == "mixed" else self.captions == "full"
        return caption(scene, rng, full, image=frames == 1)


def _to_video(pixels: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) to float (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous().float().mul_(2 / 255).sub_(1)[None]
