"""Files opened safely, and the only home of a video decoder: frames with the times at which they are shown."""

from __future__ import annotations

import io
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import BinaryIO

import av
from av.container import InputContainer
from PIL import Image
from torch.utils.data import get_worker_info

from reelm.data.images import is_image, pictures

Source = str | os.PathLike[str] | bytes | BinaryIO
Timed = tuple[float, float, av.VideoFrame]  # seconds since the first frame, seconds it is shown (0: unsaid), frame

# Containers that hold their media themselves. Playlists and whatever else names other files stay out.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,h261,h263,h264,hevc,vvc,obu,av1,ivf,gif,ogg,asf,"
    "mxf,nut,dv,rm,wtv,yuv4mpegpipe,wav,mp3,flac,aac"
)
LOOK_AHEAD = 2.0  # seconds that are rather decoded than skipped by a seek
SNIFFED = 48  # packets whose times tell the frame rate
REMOTE = ("pipe:", "concat:", "file:", "data:", "subfile:", "crypto:", "fd:", "cache:", "async:")

DAMAGE = (
    av.error.FFmpegError, OSError, ValueError, ArithmeticError, LookupError, MemoryError, SyntaxError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


class VideoError(ValueError):
    """A file that cannot be read as asked; the message is one line: the file, what is wrong, what to do."""


@dataclass(frozen=True)
class Limits:
    """What one file may cost; checked before and while it is decoded.

    pixels: of one frame. frames: decoded. seconds: of work. memory: bytes of the finished clip. bytes: of a picture.
    """

    pixels: int = 40_000_000
    frames: int = 20_000
    seconds: float = 60.0
    memory: int = 4 << 30
    bytes: int = 256 << 20


def named(source: Source) -> str:
    """How messages call a source."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "<bytes>")
    return " ".join(str(name).encode("utf-8", "backslashreplace").decode().split("\n"))[-300:]


def _reason(error: Exception) -> str:
    if isinstance(error, (av.error.InvalidDataError, av.error.EOFError)):
        return "is damaged or no video: leave it out or make it anew"
    if isinstance(error, av.error.ArgumentError):
        return "is not in a format that is read (playlists and links never are): convert it to mp4"
    if isinstance(error, (av.error.DecoderNotFoundError, av.error.PatchWelcomeError)):
        return "needs a decoder that is not there: convert it to H.264 mp4"
    text = " ".join(str(error).split())[:160] or type(error).__name__
    return f"cannot be read ({text}): leave it out or convert it to mp4"


class MediaFile:
    """A file that is opened safely; what is read of it is bounded.

    Args:
        source: a local path, the bytes of a file, or a binary file object that can seek (a member of a tar, say).
        limits: what it may cost.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        self.source, self.limits, self.name = source, limits, named(source)
        self.start_clock()

    def error(self, text: str) -> VideoError:
        return VideoError(f"{self.name}: {text}")

    @contextmanager
    def explained(self):
        """Turns whatever a damaged file makes the libraries raise into a VideoError of one line."""
        try:
            yield
        except VideoError:
            raise
        except DAMAGE as error:
            raise self.error(_reason(error)) from error

    def start_clock(self) -> None:
        self.began, self.decoded = time.monotonic(), 0

    def tick(self) -> None:
        """Called for every packet and frame; raises when one of the limits is reached."""
        if time.monotonic() - self.began > self.limits.seconds:
            raise self.error(f"took longer than {self.limits.seconds:g} s: shorten it or raise limits.seconds")
        if self.decoded > self.limits.frames:
            raise self.error(f"takes more than {self.limits.frames} frames: ask for less or raise limits.frames")

    def _check_source(self) -> None:
        if not isinstance(self.source, (str, os.PathLike)):
            return
        path = os.fspath(self.source)
        if "\0" in path or not os.path.exists(path):
            remote = "://" in path or path.startswith(REMOTE)
            raise self.error("is not a local file: fetch it first" if remote else "does not exist: check the path")
        if not os.path.isfile(path):
            raise self.error("is not a regular file: name one file (a folder of clips is read by VideoFolder)")
        if os.path.getsize(path) == 0:
            raise self.error("is empty: leave it out")

    def _head(self) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[:16]
        if isinstance(self.source, (str, os.PathLike)):
            with open(self.source, "rb") as file:
                return file.read(16)
        self.source.seek(0)
        return self.source.read(16)

    def opened(self) -> InputContainer:
        """The file as a container that can open nothing else."""
        options = {"format_whitelist": FORMATS, "max_pixels": str(self.limits.pixels)}
        if isinstance(self.source, (str, os.PathLike)):
            file, options["protocol_whitelist"] = "file:" + os.path.abspath(self.source), "file"
        else:
            file, options["protocol_whitelist"] = (
                io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source,
                "none",
            )
            file.seek(0)
        return av.open(file, options=options, metadata_errors="ignore")


class Decoder(MediaFile):
    """One open file and its frames; the arguments are those of `MediaFile`.

    first: its first frame. still: whether that is all, a picture without duration. rate: frames a second as the
    timestamps say. zero: the container's time of the first frame. broken: why decoding stopped before the end, once it
    did. Raises VideoError.
    """

    def __init__(self, source: Source, limits: Limits) -> None:
        super().__init__(source, limits)
        self.container: InputContainer | None = None
        self.zero: float | None = None
        self.rate = Fraction(25)
        self.broken: str | None = None
        self._kept: list[Timed] | None = None
        with self.explained():
            self._check_source()
            self.image = is_image(self._head())
            self._fresh: Iterator[Timed] | None = self._restarted()
            head = next(self._fresh, None)
        if head is None:
            raise self.error(self.broken or "holds no frame that can be decoded: leave it out or make it anew")
        self.first = head[2]
        self.still = self.image and head[1] == 0
        self._fresh = chain([head], self._fresh)

    def close(self) -> None:
        if self.container is not None:
            self.container.close()

    def keep(self) -> None:
        """Decodes the whole file once and for all; from then on `frames` takes them from memory."""
        with self.explained():
            self._kept = list(self.frames())

    def frames(self, start: float = 0.0) -> Iterator[Timed]:
        """Frames in the order they are shown, from one at or before `start` seconds after the first frame."""
        if self._kept is not None:
            after = bisect_right(self._kept, start, key=lambda timed: timed[0])
            return iter(self._kept[max(after - 1, 0) :])
        fresh, self._fresh = self._fresh, None
        if fresh is not None and (start < LOOK_AHEAD or self.image):
            return fresh
        if start >= LOOK_AHEAD and not self.image and self.can_seek:
            try:
                frames = self._restarted(seek_to=self.zero + start - 1 / float(self.rate))
                head = next(frames, None)
            except av.error.FFmpegError:
                head = None
            if head is not None and head[0] <= start:
                return chain([head], frames)
        return self._restarted()

    @property
    def can_seek(self) -> bool:
        """AVI and raw streams have no presentation times to seek to."""
        return self.container.format.name != "avi" and self.stream.start_time is not None

    @property
    def has_audio(self) -> bool:
        return self.container is not None and len(self.container.streams.audio) > 0

    def header_frames(self) -> int | None:
        """How many frames the header claims, None where it says nothing."""
        return None if self.image else self.stream.frames or None

    def duration(self) -> float:
        """Seconds of video: as the header says, else measured by reading (not decoding) the end of the file."""
        if self.image:
            return sum(lasts for _, lasts, _ in self._pictures())
        if self.stream.duration and self.container.format.name not in ("mpegts", "mpeg"):
            return float(self.stream.duration * self.stream.time_base)
        with self.explained(), self.opened() as container:
            if container.duration and self.can_seek:
                try:
                    container.seek((container.start_time or 0) + container.duration)
                except av.error.FFmpegError:
                    pass
                end = self._end(container)
                if end:
                    return end
        with self.explained(), self.opened() as container:
            return self._end(container)

    def _end(self, container: InputContainer) -> float:
        """When the last packet from here on has been shown; 0 if there is none."""
        count, end = 0, 0.0
        for packet in container.demux(container.streams[self.stream.index]):
            self.tick()
            count += packet.size > 0
            if packet.pts is not None:
                shown = float((packet.pts + (packet.duration or 0)) * packet.time_base) - self.zero
                end = max(end, shown if packet.duration else shown + 1 / float(self.rate))
        return end or count / float(self.rate)

    # opening

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            raise self.error(
                f"is {width} x {height}, more than {self.limits.pixels} pixels: scale it or raise limits.pixels"
            )

    def _restarted(self, seek_to: float | None = None) -> Iterator[Timed]:
        """Opens the file (anew) and reads from its start, or from a key frame before `seek_to`."""
        self.broken = None
        if self.image:
            return self._pictures()
        self.close()
        self.container = self.opened()
        covers = av.stream.Disposition.attached_pic
        videos = [stream for stream in self.container.streams.video if not stream.disposition & covers]
        if not videos:
            kinds = ", ".join(sorted({stream.type for stream in self.container.streams})) or "nothing"
            raise self.error(f"holds no video, only {kinds}: leave it out")
        best = self.container.streams.best("video")
        self.stream = best if best in videos else videos[0]
        context = self.stream.codec_context
        if context is None:
            raise self.error("needs a decoder that is not there: convert it to H.264 mp4")
        self._check_pixels(context.width, context.height)
        if self.stream.metadata.get("alpha_mode") == "1" and context.name in ("vp8", "vp9"):
            # Only this decoder knows how Matroska keeps transparency.
            context = av.CodecContext.create("libvpx" if context.name == "vp8" else "libvpx-vp9", "r")
        context.options = {"max_pixels": str(self.limits.pixels)}
        if get_worker_info() is not None:
            context.thread_count = 1
        if seek_to is not None:
            self.container.seek(int(seek_to / self.stream.time_base), stream=self.stream)
            packets = self.container.demux(self.stream)
        else:
            packets = self._sniffed(self.container.demux(self.stream))
        return self._timed(self._decoded(context, packets))

    # decoding

    def _sniffed(self, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        """The same packets; `rate` is set from the times of the first ones, where the header's rate disagrees."""
        first = list(islice(packets, SNIFFED))
        times = sorted({packet.pts for packet in first if packet.pts is not None})
        claims = [rate for rate in (self.stream.average_rate, self.stream.guessed_rate) if rate]
        if len(times) > 1:
            gap = float((times[-1] - times[0]) * self.stream.time_base) / (len(times) - 1)
            claims = [rate for rate in claims if 0.8 < rate * gap < 1.25] or [Fraction(1 / gap).limit_denominator(1001)]
            claims.sort(key=lambda rate: abs(rate * gap - 1))
        self.rate = next((rate for rate in claims if 1 / 600 <= rate <= 1000), Fraction(25))
        return chain(first, packets)

    def _decoded(self, context: av.VideoCodecContext, packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
        """Frames up to the first packet that cannot be decoded; those before the first key frame are passed over."""
        started = False
        for packet in packets:
            self.tick()
            try:
                frames, damaged = context.decode(packet), False
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                self.broken = "is damaged: ask for less or leave it out" if started else _reason(error)
                if not started:
                    continue
                frames, damaged = self._flushed(context), True
            for frame in frames:
                self.decoded += 1
                self.tick()
                self._check_pixels(frame.width, frame.height)
                started = True
                yield frame
            if damaged:
                return
            if started:
                self.broken = None

    @staticmethod
    def _flushed(context: av.VideoCodecContext) -> list[av.VideoFrame]:
        try:
            return context.decode(None)
        except av.error.FFmpegError:
            return []

    def _timed(self, frames: Iterator[av.VideoFrame]) -> Iterator[Timed]:
        """Frames with their times since the first one of the file; times always rise.

        AVI has no presentation times, so its decoding times stand for them; raw streams have none at all, so the rate
        does. Where a stream jumps back (recordings joined end to end) time goes on by one frame.
        """
        period, by_order = 1 / float(self.rate), self.container.format.name == "avi"
        zero, last = self.zero, None
        for frame in frames:
            base = frame.time_base or self.stream.time_base
            stamp = frame.dts if by_order else frame.pts
            now = None if stamp is None else float(stamp * base)
            if zero is None:
                zero = self.zero = now or 0.0
            if now is None or (last is not None and now - zero < last - 1):
                moment = 0.0 if last is None else last + period
                zero = zero if now is None else now - moment
            else:
                moment = now - zero if last is None else max(now - zero, last + period / 100)
            last = moment
            yield moment, float(frame.duration * base) if frame.duration else 0.0, frame

    def _pictures(self) -> Iterator[Timed]:
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        for number, (moment, lasts, frame) in enumerate(pictures(file, self.limits.pixels, self.limits.bytes), 1):
            self.tick()
            self.decoded += 1
            if lasts:
                self.rate = Fraction(number / (moment + lasts)).limit_denominator(1001)
            yield moment, lasts, frame
