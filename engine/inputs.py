"""What a user has (a prompt, pictures, clips, a mask), and what a model is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reelm.data.audio import resampled
from reelm.data.clip import Clip
from reelm.data.controls import control_image, flow, pseudo_depth
from reelm.data.reading import probe, read_image, read_video
from reelm.data.sounds import SoundReader
from reelm.engine.video_model import VideoModel
from reelm.tasks.formats import Format
from reelm.tasks.task import Given

NEEDS = {  # what each task cannot do without
    "t2v": ("prompt",),
    "t2i": ("prompt",),
    "unconditional": (),
    "i2v": ("image",),
    "continuation": ("video",),
    "backward": ("video",),
    "interpolation": ("image", "last"),
    "connection": ("video", "last"),
    "loop": ("image",),
    "inpainting": ("video", "mask"),
    "outpainting": ("video",),
    "stylization": ("video", "prompt"),
    "t2av": ("prompt",),
    "v2a": ("video",),
    "a2v": ("audio",),
    "av_continuation": ("video",),
}
ALSO = dict.fromkeys(("inpainting", "stylization", "v2a", "a2v"), ("start",)) | {"outpainting": ("start", "keep")}
"""What each can be told too."""
SOUNDING = ("t2av", "v2a", "av_continuation")  # those whose result is heard
NAMES = ("image", "last", "video", "mask", "audio", "start", "keep")


@dataclass(frozen=True)
class Inputs:
    """What a user gives: a prompt and paths, or clips that were made before.

    image: a picture (or a clip, of which the first frame counts). last: what is at the end: a picture, or for a
    connection a clip. video: a clip or picture of any size, rate and container. mask: a picture of the video's size,
    white where new content is to appear. audio: a sound, or a clip with one. keep: share of the frame that an
    outpainted clip fills. start: second of the video, or of the sound, from which it is read.
    """

    prompt: str = ""
    image: str | Clip | None = None
    last: str | Clip | None = None
    video: str | Clip | None = None
    mask: str | None = None
    keep: float = 0.6
    start: float = 0.0
    audio: str | Clip | None = None

    def task(self) -> str:
        """The task that these inputs ask for, where none is named."""
        if self.image:
            return "interpolation" if self.last else "i2v"
        if self.video:
            return "inpainting" if self.mask else "connection" if self.last else "continuation"
        if self.audio:
            return "a2v"
        return "t2v"

    def check(self, task: str) -> None:
        given = {name: not isinstance(value, str) or bool(value.strip()) for name, value in vars(self).items() if value}
        missing = [name for name in NEEDS.get(task, ()) if not given.get(name)]
        if missing:
            raise ValueError(f"task={task} needs {' and '.join(f'{name}=...' for name in missing)}")
        for name in ("keep", "start"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ValueError(f"{name}={getattr(self, name)} is not a number; leave it out or give one")
        if not 0.2 <= self.keep < 1:
            raise ValueError(f"keep={self.keep}, the share of the frame that the clip fills, is from 0.2 to below 1")
        if not 0 <= self.start < math.inf:
            raise ValueError(f"start={self.start} is the second from which a clip is read; give 0 or more")
        for name in NAMES:
            value = getattr(self, name)
            if value and name not in self.used(task) and value != getattr(Inputs, name):
                raise ValueError(f"task={task} has no use for {name}={value}; leave it out")

    @staticmethod
    def used(task: str) -> tuple[str, ...]:
        """Names of what a task makes use of."""
        return *NEEDS.get(task, ()), *ALSO.get(task, ())

    def alone(self, task: str) -> Inputs:
        """Those that a task makes use of."""
        usual = Inputs()
        return replace(self, **{name: getattr(usual, name) for name in NAMES if name not in self.used(task)})

    @staticmethod
    def slot(task: str) -> str:
        """As what a task goes on from a clip that was made: as its video, its image, or its sound."""
        slot = next((name for name in ("video", "image", "audio") if name in NEEDS.get(task, ())), None)
        if slot is None:
            raise ValueError(f"task={task} takes no clip, so it can only be the first of a chain")
        return slot

    def after(self, clip: Clip, task: str) -> Inputs:
        """The inputs of a task that goes on from a clip that was made."""
        return replace(self.alone(task), **{self.slot(task): clip})

    def sources(self) -> dict[str, str]:
        """The paths that are read, by name."""
        return {name: value for name in NAMES if isinstance(value := getattr(self, name), str) and value}


def whole_length(frames: int, step: int, note: Callable[[str], None]) -> int:
    """The nearest length of `1 + step * k` frames, with a note where it is another."""
    length = max(round((frames - 1) / step), 0) * step + 1
    if length != frames:
        note(f"{frames} frames are not 1 + {step}k: making {length}")
    return length


def overlap(model: VideoModel, form: Format, task: str = "") -> int:
    """Frames of one window that the next one starts from: about a second (VideoPoet, section 5.3), at most half, and no
    more than the task was learned with where that is more than one latent frame."""
    step = model.tokenizer.compression[0]
    count = 1 + max(min(round(form.fps / step), (form.frames - 1) // (2 * step)), 1) * step
    learned = getattr(model.tasks.get(task), "last" if task == "backward" else "first", 0)
    most = max(learned, default=0) if isinstance(learned, Collection) else learned
    return min(count, most) if most > step else count


def _read(source: str | Clip, form: Format, start: float = 0.0, size: tuple[int, int] | None = None) -> Clip:
    """So much of a clip as a format has, the last frame repeated where it ends too early."""
    size = size or form.size
    if isinstance(source, Clip):
        return _fitted(source, form, start, size)
    return read_video(source, fps=form.fps, frames=form.frames, size=size, start=start, short="repeat")


def _check_start(clip: Clip, start: float) -> None:
    if start >= clip.frames / clip.fps:
        raise ValueError(f"start={start} lies after the end of the clip that was made before; give an earlier second")


def _fitted(clip: Clip, form: Format, start: float, size: tuple[int, int]) -> Clip:
    """What `read_video` makes of a file, of a clip that was made."""
    _check_start(clip, start)
    index = ((torch.arange(form.frames) / form.fps + start) * clip.fps).round().long().clamp_max(clip.frames - 1)
    video = clip.video[:, :, index.to(clip.video.device)]
    if clip.size != size:
        scale = max(want / have for want, have in zip(size, clip.size, strict=True))
        scaled = [max(round(side * scale), want) for side, want in zip(clip.size, size, strict=True)]
        frames = F.interpolate(video.transpose(1, 2).flatten(0, 1), scaled, mode="bicubic", antialias=True)
        top, left = ((have - want) // 2 for have, want in zip(scaled, size, strict=True))
        frames = frames[..., top : top + size[0], left : left + size[1]].clamp(-1, 1)
        video = frames.unflatten(0, (len(clip), form.frames)).transpose(1, 2)
    return Clip(video, form.fps, clip.captions)


def _image(source: str | Clip, size: tuple[int, int]) -> Tensor:
    """`(B, 3, 1, H, W)`."""
    if isinstance(source, Clip):
        return _fitted(source, Format(1, size, source.fps), 0.0, size).video
    return read_image(source, size=size).video


def _seconds(source: str | Clip) -> float:
    return source.frames / source.fps if isinstance(source, Clip) else probe(source).duration or 0.0


def _rate(model: VideoModel, task: str) -> int:
    if model.audio is None:
        raise ValueError(f"task={task} needs a model that was trained with an audio tokenizer; this one was not")
    return model.audio.rate


def _sound(source: str | Clip, form: Format, rate: int, start: float = 0.0) -> Tensor:
    """`(B, C, N)` at the rate that the model hears, as long as a clip of the format, silent where the source ends."""
    seconds = form.frames / form.fps
    if not isinstance(source, Clip):
        with SoundReader(source) as reader:
            if start and start >= reader.duration():
                raise ValueError(f"{source} ends before start={start} s; give an earlier second")
            return reader.read(start, seconds, rate)
    if source.audio is None:
        raise ValueError("the clip that was made before has no sound to go on from")
    _check_start(source, start)
    audio = source.audio
    if source.audio_rate != rate:
        waves = [resampled(wave, source.audio_rate, rate) for wave in audio.cpu().float().numpy()]
        audio = torch.from_numpy(np.stack(waves)).to(audio)
    first, count = round(start * rate), round(seconds * rate)
    return F.pad(audio, (0, max(first + count - audio.shape[-1], 0)))[..., first : first + count]


def _with_sound(source: str | Clip, form: Format, start: float, rate: int) -> Clip:
    """As `_read`, with the sound of the same stretch. In a file too its time is that of the frames, whenever the track
    begins."""
    if isinstance(source, Clip):
        return _read(source, form, start).replace(audio=_sound(source, form, rate, start), audio_rate=rate)
    options = {"fps": form.fps, "frames": form.frames, "size": form.size, "start": start, "short": "repeat"}
    clip = read_video(source, **options, audio=True, audio_rate=rate)
    if clip.audio is None:
        raise ValueError(f"{source} holds no sound that can be decoded; give a clip with sound")
    return clip


def _part(source: str | Clip, form: Format, step: int, most: int, end: bool) -> tuple[Format, float]:
    """The first or last frames of a clip that are told, `1 + step * k` of them and at most `most`: a format of so many,
    and the second at which they begin."""
    have = max(int(_seconds(source) * form.fps + 1e-3), 1)
    count = 1 + (min(have, most) - 1) // step * step
    return replace(form, frames=count), max(have - count, 0) / form.fps if end else 0.0


def _mask(inputs: Inputs, size: tuple[int, int]) -> Tensor:
    """`(1, 1, 1, H, W)` bool, true where the video is known, cut to size as the video is."""
    mask = read_image(inputs.mask, size=None)
    source = inputs.video if isinstance(inputs.video, Clip) else probe(inputs.video)
    if mask.size != source.size:
        raise ValueError(
            f"mask {inputs.mask} is {mask.size[1]} x {mask.size[0]}, the video {source.size[1]} x {source.size[0]}; "
            "make the mask as large as the video"
        )
    known = read_image(inputs.mask, size=size).video.mean(1, keepdim=True) < 0
    if known.all() or not known.any():
        raise ValueError(
            f"mask {inputs.mask} is all {'black' if known.all() else 'white'}; paint white what is to be made"
        )
    return known


def at_ends(form: Format, first: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """A clip `(B, 3, T, H, W)` with these frames at its beginning and end, and which of its pixels are known."""
    batch = max(len(part) for part in (first, last) if part is not None)
    video = torch.zeros(batch, 3, *form.shape)
    known = torch.zeros(1, 1, *form.shape, dtype=torch.bool)
    if first is not None:
        video[:, :, : first.shape[2]], known[:, :, : first.shape[2]] = first, True
    if last is not None:
        video[:, :, -last.shape[2] :], known[:, :, -last.shape[2] :] = last, True
    return video, known


def order_of(model: VideoModel, task: str) -> str:
    """In which order the model makes the latent frames of a task (`task.ORDERS`)."""
    return getattr(model.task(task), "order", "forward")


def first_given(model: VideoModel, task: str, inputs: Inputs, form: Format, samples: int, frames: int) -> Given:
    """What the model is told for its first window of a clip that is to have `frames` frames."""
    inputs.check(task)
    size, step = form.size, model.tokenizer.compression[0]
    if inputs.prompt and not model.prompted(task):
        raise ValueError(f"task={task} heeds no prompt; leave prompt={inputs.prompt!r} out")
    given = Given(form.shape, (inputs.prompt,) * samples, fps=form.fps, order=order_of(model, task))
    most = min(overlap(model, form, task), max(min(form.frames, frames) - step, 1))
    video = known = None
    if task == "i2v":
        video = _image(inputs.image, size)
    elif task == "interpolation":
        video, known = at_ends(form, _image(inputs.image, size), _image(inputs.last, size))
    elif task == "loop":
        first = _image(inputs.image, size)
        video, known = at_ends(form, first, first)
    elif task == "continuation":
        video = _read(inputs.video, *_part(inputs.video, form, step, most, end=True)).video
    elif task == "backward":
        last = _read(inputs.video, *_part(inputs.video, form, step, most, end=False)).video
        video, known = at_ends(form, None, last)
    elif task == "connection":
        most = min(most, 1 + max((form.frames - 1) // (3 * step), 0) * step)  # a third of the clip each
        ends = ((inputs.video, True), (inputs.last, False))
        parts = (_read(source, *_part(source, form, step, most, end)).video for source, end in ends)
        video, known = at_ends(form, *parts)
    elif task == "v2a":
        video, given = _read(inputs.video, form, inputs.start).video, given.replace(asks=("audio",))
    elif task == "a2v":
        rate = _rate(model, task)
        given = given.replace(audio=_sound(inputs.audio, form, rate, inputs.start), audio_rate=rate)
    elif task == "t2av":
        given = given.replace(asks=("video", "audio"))
    elif task == "av_continuation":
        told, rate = _part(inputs.video, form, step, most, end=True), _rate(model, task)
        clip = _with_sound(inputs.video, *told, rate)
        video, given = clip.video, given.replace(audio=clip.audio, audio_rate=rate, asks=("video", "audio"))
    elif task == "inpainting":
        video = _read(inputs.video, form, inputs.start).video
        known = _mask(inputs, size)
    elif task == "outpainting":
        inner = [max(round(side * inputs.keep), 8) for side in size]
        clip = _read(inputs.video, form, inputs.start, (inner[0], inner[1])).video
        top, left = ((side - part) // 2 for side, part in zip(size, inner))
        pads = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
        video, known = F.pad(clip, pads), F.pad(torch.ones_like(clip[:, :1], dtype=torch.bool), pads)
    elif task == "stylization":
        clip = _read(inputs.video, form, inputs.start).video
        given = given.replace(condition=control_image(pseudo_depth(clip), flow(clip)).expand(samples, -1, -1, -1, -1))
    if given.audio is not None:
        given = given.replace(audio=given.audio.expand(samples, -1, -1))
    if video is None:
        return given
    known = torch.ones_like(video[:, :1], dtype=torch.bool) if known is None else known
    known = known.expand(samples, -1, video.shape[2], *size)
    return given.replace(video=(video * known).expand(samples, -1, -1, -1, -1), known=known)
