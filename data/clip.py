"""`Clip`: the one value that every dataset makes, every task splits and every model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Clip:
    """A batch of videos with what is known about them. An image is a clip of one frame.

    video: `(B, 3, T, H, W)` float in [-1, 1]. Where tokens alone are known it is on the meta device: a shape without
        pixels, so that whatever asks for pixels fails instead of taking others for them.
    fps: frames a second, one number for the whole batch.
    captions: one string a sample ("" where there is none).
    audio: `(B, C, N)` float in [-1, 1] at `audio_rate` samples a second, or None.
    controls: named tensors whose first axis is the batch: mask `(B, 1, T, H, W)` bool, depth `(B, 1, T, H, W)` in
        [0, 1] (1 is near), flow `(B, 2, T, H, W)` in pixels to the next frame, camera `(B, T, 3, 4)`...
    keys: where each sample came from (a path, or "zoetrope/train/17"), for messages and for exact-resume checks.
    tokens: ids `(B, t, h, w)` int64, or latents `(B, t, h, w, D)` float, that a tokenizer made of exactly this video;
        or None.
    """

    video: Tensor
    fps: float = 8.0
    captions: tuple[str, ...] = ()
    audio: Tensor | None = None
    audio_rate: int | None = None
    controls: Mapping[str, Tensor] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.video.ndim != 5 or self.video.shape[1] != 3:
            raise ValueError(f"a clip's video is (B, 3, T, H, W); got {tuple(self.video.shape)}")
        if self.tokens is not None and (self.tokens.ndim not in (4, 5) or len(self.tokens) != len(self.video)):
            raise ValueError(f"{len(self.video)} videos have tokens (B, t, h, w[, D]); got {tuple(self.tokens.shape)}")
        for name in ("captions", "keys"):
            values = tuple(getattr(self, name)) or ("",) * len(self.video)
            if len(values) != len(self.video):
                raise ValueError(f"{len(self.video)} videos but {len(values)} {name}")
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(self.video)

    @property
    def frames(self) -> int:
        return self.video.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.video.shape[3], self.video.shape[4]

    @property
    def device(self) -> torch.device:
        """Where what is known of the clips is."""
        return self.video.device if self.tokens is None else self.tokens.device

    def replace(self, **changes) -> Clip:
        return replace(self, **changes)

    def to(self, *args, **kwargs) -> Clip:
        """The same clip with its tensors moved; a dtype applies to floating tensors only."""

        def move(value):
            if isinstance(value, Tensor) and value.is_meta:  # nothing there that could be moved
                return value
            if isinstance(value, Tensor):
                if value.is_floating_point():
                    return value.to(*args, **kwargs)
                device = torch._C._nn._parse_to(*args, **kwargs)[0]
                return value if device is None else value.to(device)
            if isinstance(value, Mapping):
                return {key: move(item) for key, item in value.items()}
            return value

        return Clip(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, index: int | slice) -> Clip:
        """A batch of the chosen samples (an int gives a batch of one)."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return self.replace(
            video=self.video[index],
            captions=self.captions[index],
            keys=self.keys[index],
            audio=None if self.audio is None else self.audio[index],
            tokens=None if self.tokens is None else self.tokens[index],
            controls={name: value[index] for name, value in self.controls.items()},
        )

    @staticmethod
    def stack(clips: Sequence[Clip]) -> Clip:
        """One batch from several (a DataLoader's `collate_fn`); shapes, rates and control names must agree."""
        first = clips[0]
        for clip in clips[1:]:
            if clip.video.shape[1:] != first.video.shape[1:] or clip.fps != first.fps:
                raise ValueError(
                    f"clips of one batch differ: {first.keys[0]} is {tuple(first.video.shape[1:])} at {first.fps} fps, "
                    f"{clip.keys[0]} is {tuple(clip.video.shape[1:])} at {clip.fps} fps"
                )
        audio = [clip.audio for clip in clips if clip.audio is not None]
        tokens = [clip.tokens for clip in clips if clip.tokens is not None]
        return first.replace(
            video=torch.cat([clip.video for clip in clips]),
            captions=tuple(caption for clip in clips for caption in clip.captions),
            keys=tuple(key for clip in clips for key in clip.keys),
            audio=torch.cat(audio) if len(audio) == len(clips) else None,
            tokens=torch.cat(tokens) if len(tokens) == len(clips) else None,
            controls={name: torch.cat([clip.controls[name] for clip in clips]) for name in first.controls},
        )
