"""The Zoetrope world as a dataset of clips, rendered when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reelm.data.clip import Clip
from reelm.data.zoetrope.captions import caption
from reelm.data.zoetrope.render import render
from reelm.data.zoetrope.scene import MOTIONS, SPLITS, Scene, sample_scene
from reelm.data.zoetrope.sound import sound
from reelm.data.zoetrope.truth import truth

RATE = 16_000  # samples of sound a second
CONTROLS = {"depth": "depth", "flow": "flow", "camera": "camera", "mask": "masks"}  # a control, and the truth it shows


class Zoetrope(Dataset[Clip]):
    """Clips of one split, each a pure function of `(seed, split, index)`.

    size: pixels, one number or (height, width). short_captions: share of captions that tell only colours, shapes and
    motions. moving_camera: share of the scenes with a textured background in which the camera moves. one_object: share
    of the scenes with one object. controls: which truths every clip carries, of "depth", "flow", "camera" and "mask"
    (all objects together). audio: carry the scene's stereo sound, `frames / fps` seconds at 16 kHz (an image has none).
    motions: what objects may do, where it is not all that they can ("train" and "validation" alone).
    """

    def __init__(
        self,
        split: str = "train",
        size: int | tuple[int, int] = 64,
        frames: int = 17,
        fps: float = 8.0,
        seed: int = 0,
        length: int = 1_000_000,
        short_captions: float = 0.5,
        moving_camera: float = 0.45,
        one_object: float = 0.45,
        controls: Sequence[str] = (),
        audio: bool = False,
        motions: Sequence[str] = (),
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        shares = {"short_captions": short_captions, "moving_camera": moving_camera, "one_object": one_object}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share between 0 and 1; got {share}")
        unknown = [name for name in controls if name not in CONTROLS]
        if unknown:
            raise ValueError(f"Zoetrope has no control {unknown[0]!r}: choose from {', '.join(CONTROLS)}")
        strange = [name for name in motions if name not in MOTIONS]
        if strange:
            raise ValueError(f"Zoetrope has no motion {strange[0]!r}: choose from {', '.join(MOTIONS)}")
        if motions and split == "compositional":
            raise ValueError("the compositional split is made of held-out motions; leave motions=[]")
        self.split, self.frames, self.fps = split, frames, fps
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.seed, self.length = seed, length
        self.short_captions, self.moving_camera, self.one_object = short_captions, moving_camera, one_object
        self.controls, self.audio, self.motions = tuple(controls), audio, tuple(motions)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        return self.get(index)

    def scene(self, index: int, frames: int | None = None, fps: float | None = None) -> Scene:
        """The scene of a clip; one frame gives a still scene, and longer clips have slower motions."""
        frames = frames or self.frames
        number = self._checked(index)
        if frames == 1:
            return sample_scene(self.seed, self.split, number, still=True, one_object=self.one_object)
        options = {"moving_camera": self.moving_camera, "one_object": self.one_object, "only": self.motions}
        return sample_scene(self.seed, self.split, number, seconds=frames / (fps or self.fps), **options)

    def caption(self, index: int, frames: int | None = None) -> str:
        """The caption of a clip, without drawing it."""
        return self._caption(self.scene(index, frames), index, frames or self.frames)

    def get(
        self,
        index: int,
        frames: int | None = None,
        controls: Sequence[str] | None = None,
        draw: int = 0,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        audio: bool | None = None,
    ) -> Clip:
        """A batch of one clip with `frames` frames (1 is an image), these controls, size and rate, with its sound or
        without; default: as the dataset has them.

        draw: of no effect; a scene is the same in each pass over the data.
        """
        frames, size, fps = frames or self.frames, size or self.size, fps or self.fps
        scene = self.scene(index, frames, fps)
        pixels = render(scene, frames, size, fps)
        controls = self.controls if controls is None else tuple(controls)
        wave = None
        if (self.audio if audio is None else audio) and frames > 1:
            wave = torch.from_numpy(sound(scene, frames / fps, RATE))[None]
        return Clip(
            video=_to_video(pixels),
            fps=fps,
            audio=wave,
            audio_rate=None if wave is None else RATE,
            controls=self._controls(scene, controls, frames, size, fps),
            captions=(self._caption(scene, index, frames),),
            keys=(self.key(index),),
        )

    def sound(self, index: int, rate: int = RATE, frames: int | None = None, draw: int = 0) -> Clip:
        """The sound of the same clip at `rate` samples a second, without drawing: the video has no pixels.

        Raises ValueError for an image.
        """
        frames = frames or self.frames
        if frames == 1:
            raise ValueError("an image has no sound; ask for frames=5 or more")
        scene = self.scene(index, frames)
        return Clip(
            video=torch.empty(1, 3, frames, *self.size, device="meta"),
            fps=self.fps,
            audio=torch.from_numpy(sound(scene, frames / self.fps, rate))[None],
            audio_rate=rate,
            captions=(self._caption(scene, index, frames),),
            keys=(self.key(index),),
        )

    read = get  # every clip can be made, so none takes another's place

    def key(self, index: int) -> str:
        return f"zoetrope/{self.split}/{index}"

    def _controls(
        self, scene: Scene, names: tuple[str, ...], frames: int, size: tuple[int, int], fps: float
    ) -> dict[str, Tensor]:
        fields = {CONTROLS[name] for name in names if name in CONTROLS}
        if len(fields) < len(set(names)):
            unknown = next(name for name in names if name not in CONTROLS)
            raise ValueError(f"Zoetrope has no control {unknown!r}: choose from {', '.join(CONTROLS)}")
        known = truth(scene, frames, size, fps, tuple(fields)) if fields else {}
        made = {}
        for name in names:
            values = torch.from_numpy(known[CONTROLS[name]])
            if name == "mask":
                values = values.any(0)[None]  # (1, T, H, W)
            elif name == "depth":
                values = values[None]
            elif name == "flow":
                values = values.permute(3, 0, 1, 2).contiguous()
            made[name] = values[None]
        return made

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"Zoetrope has the indices 0 to {self.length - 1}; got {index}")
        return index

    def _caption(self, scene: Scene, index: int, frames: int) -> str:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(SPLITS.index(self.split), index, 2))
        rng = np.random.Generator(np.random.PCG64(sequence))
        full = rng.random() < 1 - self.short_captions
        return caption(scene, rng, full, image=frames == 1)


def _to_video(pixels: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) to float (1, 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous().float().mul_(2 / 255).sub_(1)[None]
