"""Clips in: any local video or image becomes a `Clip`, its frames chosen by time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from av import VideoFrame
from torch import Tensor

from reelm.data.audio import read_track
from reelm.data.clip import Clip
from reelm.data.decoding import Decoder, Limits, Source, Timed, VideoError
from reelm.data.fitting import Fit, Fitter, Orientation, Size, pixel_aspect

LIMITS = Limits()
Short = Literal["error", "repeat", "shorter"]
__all__ = ["Limits", "VideoError", "VideoInfo", "VideoReader", "probe", "read_image", "read_video"]


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds.

    size: (height, width) of the stored pixels, upright. pixel_aspect: width over height of one of them, as shown.
    fps: as the timestamps say; 0 for a still. duration: seconds of video; 0 for a still. frames: as the header says,
    None where it does not.
    """

    size: tuple[int, int]
    fps: float
    duration: float
    frames: int | None
    has_audio: bool
    pixel_aspect: float = 1.0


def sampled(frames: Iterator[Timed], start: float, fps: float, count: int | None) -> Iterator[VideoFrame]:
    """The frame nearest to each of the times start + i / fps, i < count, as far as the frames last.

    Nearest keeps the error within half a source frame. A frame that stands for long (a slide, a slow screen recording)
    is left at most half an output frame early.
    """
    index, before, shown = 0, 0.0, None
    lasts = 0.0
    for moment, said, frame in frames:
        if shown is not None:
            border = moment - min((moment - before) / 2, 0.5 / fps)
            while (count is None or index < count) and start + index / fps < border:
                yield shown
                index += 1
            lasts = moment - before
        if index == count:
            return
        # A header that claims 1000 frames a second makes frames of 1 ms; the gap before is the better witness then.
        lasts = said if said >= lasts / 2 else lasts
        shown, before = frame, moment
    while shown is not None and (count is None or index < count) and start + index / fps < before + lasts - 1e-6:
        yield shown
        index += 1


def consecutive(frames: Iterator[Timed], start: float, slack: float, count: int | None) -> Iterator[VideoFrame]:
    """Every frame once, from the one nearest to `start` on."""
    index = 0
    for moment, _, frame in frames:
        if index == count:
            return
        if moment >= start - slack:
            yield frame
            index += 1


class VideoReader:
    """One open file: `info` tells about it, `read` makes a clip of a part of it. Use it in a `with` statement.

    Args:
        source: a local path, the bytes of a file, or a binary file object that can seek (a member of a tar, say).
        limits: what it may cost.

    Raises VideoError for whatever is no readable local video or image.
    """

    def __init__(self, source: Source, limits: Limits = LIMITS) -> None:
        self.decoder = Decoder(source, limits)
        self._info: VideoInfo | None = None

    def keep(self) -> None:
        """Decodes the whole file once and for all: for files that are read again and again."""
        self.decoder.start_clock()
        self.decoder.keep()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        self.decoder.close()

    @property
    def _aspect(self) -> float:
        if self.decoder.image:
            return 1.0
        stream = self.decoder.stream
        return pixel_aspect(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio)

    @property
    def info(self) -> VideoInfo:
        if self._info is None:
            decoder, first = self.decoder, self.decoder.first
            turned, aspect = Orientation(first).transposed, self._aspect
            duration = decoder.duration()
            self._info = VideoInfo(
                size=(first.width, first.height) if turned else (first.height, first.width),
                fps=float(decoder.rate) if duration else 0.0,
                duration=duration,
                frames=decoder.header_frames() if duration else 1,
                has_audio=decoder.has_audio,
                pixel_aspect=1 / aspect if turned else aspect,
            )
        return self._info

    def read(
        self,
        *,
        fps: float | None = 8.0,
        frames: int | None = 17,
        size: Size = 64,
        start: float = 0.0,
        fit: Fit = "crop",
        crop_at: tuple[float, float] = (0.5, 0.5),
        zoom: float = 0.0,
        short: Short = "error",
        audio: bool = False,
        audio_rate: int = 16000,
        audio_channels: int = 2,
    ) -> Clip:
        """One clip as a batch of one; the arguments are those of `read_video`."""
        decoder = self.decoder
        if fps is not None and not 0 < fps <= 1000:
            raise ValueError(f"fps={fps!r} is no frame rate: give frames a second above 0, or None for the file's own")
        if frames is not None and frames < 1:
            raise ValueError(f"frames={frames!r} is too few: give 1 or more, or None for all")
        if not 0 <= start < float("inf"):
            raise ValueError(f"start={start!r} must be 0 or more seconds")
        if short not in get_args(Short):
            raise ValueError(f"short={short!r} is unknown: use 'error', 'repeat' or 'shorter'")
        fitter = Fitter(size, fit, crop_at, decoder.limits.pixels, zoom)
        decoder.start_clock()
        rate = fps or float(decoder.rate)
        with decoder.explained():
            timed = decoder.frames(start)
            if decoder.still:
                chosen = (frame for _, _, frame in timed) if start == 0 else iter(())
            elif fps is None:
                chosen = consecutive(timed, start, 0.5 / rate, frames)
            else:
                chosen = sampled(timed, start, fps, frames)
            pictures = self._fitted(chosen, fitter)
        self._check_length(len(pictures), frames, start, rate, short)
        if short == "repeat":
            pictures += [pictures[-1]] * ((frames or 0) - len(pictures))
        video = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None]
        video = video.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
        wave = self._sound(start, len(pictures) / rate, audio_rate, audio_channels) if audio else None
        return Clip(
            video, fps=rate, audio=wave, audio_rate=None if wave is None else audio_rate, keys=(decoder.name,)
        )  # fmt: skip

    def _fitted(self, chosen: Iterator[VideoFrame], fitter: Fitter) -> list[np.ndarray]:
        aspect, limits = self._aspect, self.decoder.limits
        pictures, last = [], None
        for frame in chosen:
            if frame is not last:
                picture, last = np.ascontiguousarray(fitter(frame, aspect)), frame
            pictures.append(picture)
            if len(pictures) * picture.size * 5 > limits.memory:  # 1 byte now and 4 as float32
                raise self.decoder.error(
                    f"makes a clip of more than {limits.memory >> 20} MiB: ask for fewer frames or a smaller size"
                )
        return pictures

    def _check_length(self, have: int, want: int | None, start: float, rate: float, short: str) -> None:
        decoder = self.decoder
        if decoder.broken and (want is None or have < want):
            raise decoder.error(f"can be decoded up to frame {decoder.decoded} only, the rest {decoder.broken}")
        if have == 0:
            raise decoder.error(f"ends before start={start:g} s: choose an earlier start, or was the file cut off?")
        if want is not None and have < want and short == "error":
            what = "is a still image" if decoder.still else f"has {have} frames at {rate:.6g} fps from {start:g} s on"
            raise decoder.error(f"{what}, {want} were asked: lower frames or raise fps")

    def _sound(self, start: float, seconds: float, rate: int, channels: int) -> Tensor | None:
        decoder = self.decoder
        if not decoder.has_audio:
            return None
        with decoder.explained(), decoder.opened() as container:
            wave = read_track(container, decoder.zero + start, seconds, rate, channels, decoder.tick)
        return None if wave is None else wave[None]


def read_video(
    path: Source,
    *,
    fps: float | None = 8.0,
    frames: int | None = 17,
    size: Size = 64,
    start: float = 0.0,
    fit: Fit = "crop",
    crop_at: tuple[float, float] = (0.5, 0.5),
    zoom: float = 0.0,
    short: Short = "error",
    audio: bool = False,
    audio_rate: int = 16000,
    audio_channels: int = 2,
    limits: Limits = LIMITS,
) -> Clip:
    """A clip (a batch of one) from a local video or image file, bytes or a seekable file object.

    Args:
        fps: frames a second of the clip: frame i is the source frame nearest to `start + i / fps`, whatever the rate of
            the source, constant or not. None takes every source frame once.
        frames: how many; None reads to the end.
        size: one side of a square, (height, width), or None for every stored pixel as it is. Sizes respect the shape of
            the source's pixels; None does not.
        start: seconds after the first frame.
        fit, crop_at, zoom: how another shape comes to `size` (`Fitter`).
        short: what a source that ends too early gives: a VideoError, its last frame repeated, or a shorter clip.
        audio: also read the sound of the same stretch of time, `(1, audio_channels, N)` at `audio_rate` samples a
            second, silent where the track has holes; None where the file has no track.
        limits: what the file may cost.

    Rotation and mirroring that the file asks for are applied; transparent pixels stand on white. High dynamic range is
    not tone-mapped and interlaced lines are not joined. Raises VideoError (a ValueError) with one line.
    """
    with VideoReader(path, limits) as reader:
        return reader.read(
            fps=fps, frames=frames, size=size, start=start, fit=fit, crop_at=crop_at, zoom=zoom, short=short,
            audio=audio, audio_rate=audio_rate, audio_channels=audio_channels,
        )  # fmt: skip


def read_image(path: Source, size: Size = 64, fit: Fit = "crop", limits: Limits = LIMITS) -> Clip:
    """A clip of one frame from an image file (or the first frame of a video)."""
    return read_video(path, frames=1, size=size, fit=fit, limits=limits)


def probe(path: Source, limits: Limits = LIMITS) -> VideoInfo:
    """What a file holds; decodes its first frame only. Raises VideoError."""
    with VideoReader(path, limits) as reader:
        return reader.info
