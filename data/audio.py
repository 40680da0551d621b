"""The sound of a clip: one stretch of a file's audio track as a waveform, in step with its frames."""

from __future__ import annotations

from collections.abc import Callable

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

GAP = 0.02  # seconds by which a packet's time may be off before it counts as a hole: containers round to milliseconds
LAYOUTS = {1: "mono", 2: "stereo"}


def resampled(wave: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """`(C, N)` float32 at another rate, filtered against aliases; the length is N * rate / source_rate rounded."""
    count = round(wave.shape[1] * rate / source_rate)
    if source_rate != rate and count and wave.shape[1]:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=LAYOUTS[len(wave)])
        frame.sample_rate = source_rate
        resampler = av.AudioResampler(format="fltp", layout=LAYOUTS[len(wave)], rate=rate)
        pieces = [piece.to_ndarray() for piece in [*resampler.resample(frame), *resampler.resample(None)]]
        wave = np.concatenate(pieces, axis=1)
    result = np.zeros((len(wave), count), np.float32)
    result[:, : wave.shape[1]] = wave[:, :count]
    return result


def read_track(
    container: InputContainer, begin: float, seconds: float, rate: int, channels: int, tick: Callable[[], None]
) -> Tensor | None:
    """`(channels, round(seconds * rate))` of the best audio track from `begin` (seconds of the container's clock).

    What the track does not cover is silent. None where there is no audio track. `tick` is called for every packet, and
    raises when time is up. Mono is doubled, more channels are mixed down, by the usual coefficients of FFmpeg.
    """
    stream = container.streams.best("audio")
    if stream is None:
        return None
    source_rate = stream.codec_context.sample_rate or rate
    wave = np.zeros((channels, round(seconds * source_rate)), np.float32)
    to_float = av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=source_rate)
    if begin > 1.0:
        try:
            container.seek(int((begin - 0.5) / stream.time_base), stream=stream)
        except av.error.FFmpegError:
            pass  # a stream that cannot seek is read from where it stands
    expected = None
    for packet in container.demux(stream):
        tick()
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue  # a hole stays silent
        for frame in frames:
            stamp = frame.time if frame.pts is not None else expected
            if stamp is None:
                stamp = begin
            if expected is not None and abs(stamp - expected) < GAP:
                stamp = expected
            if stamp > begin + seconds:
                return torch.from_numpy(resampled(wave, source_rate, rate))
            frame.pts = None
            for piece in to_float.resample(frame):
                samples = piece.to_ndarray()
                at = round((stamp - begin) * source_rate)
                first, last = max(at, 0), min(at + samples.shape[1], wave.shape[1])
                if first < last:
                    wave[:, first:last] = samples[:, first - at : last - at]
                stamp += samples.shape[1] / source_rate
            expected = stamp
    return torch.from_numpy(resampled(wave, source_rate, rate))
