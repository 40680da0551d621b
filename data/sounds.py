"""Sound in, without pictures: a stretch of the audio track of any local file."""

from __future__ import annotations

from av.container import InputContainer
from torch import Tensor

from reelm.data.audio import read_track
from reelm.data.decoding import Limits, MediaFile, Source

LIMITS = Limits()


class SoundReader(MediaFile):
    """One open file with an audio track, of a video or of sound alone. Use it in a `with` statement.

    Args:
        source: a local path, the bytes of a file, or a binary file object that can seek (a member of a tar, say).
        limits: what it may cost.

    Raises VideoError, of one line, for whatever is no readable local file with sound.
    """

    def __init__(self, source: Source, limits: Limits = LIMITS) -> None:
        super().__init__(source, limits)
        self.container: InputContainer | None = None
        with self.explained():
            self._check_source()
            self.container = self.opened()
            stream = self.container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                self.container.close()
                raise self.error("holds no sound that can be decoded: leave it out, or give one with sound")
        self.stream, self.begin = stream, float((stream.start_time or 0) * stream.time_base)

    def __enter__(self) -> SoundReader:
        return self

    def __exit__(self, *_) -> None:
        if self.container is not None:
            self.container.close()

    def duration(self) -> float:
        """Seconds of sound: as the header says, else measured by reading (not decoding) the file."""
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration:
            return self.container.duration / 1e6
        end = 0.0
        with self.explained(), self.opened() as container:
            for packet in container.demux(container.streams[self.stream.index]):
                self.tick()
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - self.begin)
        return end

    def read(self, start: float, seconds: float, rate: int, channels: int = 2) -> Tensor:
        """`(1, channels, round(seconds * rate))` in [-1, 1] from `start` seconds on; silent where the track ends."""
        self.start_clock()
        with self.explained(), self.opened() as container:
            return read_track(container, self.begin + start, seconds, rate, channels, self.tick)[None]
