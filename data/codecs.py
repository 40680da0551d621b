"""What established video codecs make of a clip with as many bits as another representation takes.

Only the elementary stream counts, with the headers that decoding it needs and without a container.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.data.fitting import Fitter
from reelm.data.writing import set_format, to_uint8, yuv_frames

TOLERANCE = 0.02  # share of the bits asked for by which a result may exceed them
NEAR = 0.005  # a result so near is searched no further


@dataclass(frozen=True)
class Codec:
    """An encoder at its slowest sensible setting, steered by its constant rate factor.

    encoder, decoder: FFmpeg's names. options: of the encoder. worst: the largest rate factor, the fewest bits. step:
    the smallest change of it that counts. halving: how much of it about halves the bits.
    """

    encoder: str
    decoder: str
    options: Mapping[str, str]
    worst: float
    step: float
    halving: float


# One thread, because x264's output depends on their number; small clips vary by some per cent all the same, by its
# weighted prediction. Key frames come only where the encoder sees a cut.
CODECS = {
    "h264": Codec("libx264", "h264", {"preset": "veryslow", "x264-params": "keyint=infinite"}, 51, 0.1, 6),
    "vp9": Codec("libvpx-vp9", "vp9", {
        "b": "0", "deadline": "good", "cpu-used": "0", "auto-alt-ref": "1", "lag-in-frames": "25", "g": "9999",
    }, 63, 1, 11),
}  # fmt: skip

# Supplemental enhancement information (unit type 6) is not needed to decode; x264 writes 700 bytes of settings into it.
SEI = re.compile(rb"\x00?\x00\x00\x01\x06.*?(?=\x00?\x00\x00\x01|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Encoded:
    """A clip as a codec's packets. reached: whether they are as few as was asked for."""

    codec: str
    packets: tuple[bytes, ...]
    rate_factor: float
    reached: bool = True

    @property
    def bits(self) -> int:
        return 8 * sum(map(len, self.packets))


def check_codecs(names: Iterable[str]) -> list[str]:
    """The names, each once; ValueError for one that is no codec of ours."""
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in CODECS]
    if unknown:
        raise ValueError(f"codec {unknown[0]!r} is unknown; choose from {', '.join(CODECS)}")
    return names


def _packets(codec: Codec, pictures: Iterable[av.VideoFrame], size: tuple[int, int], crf: float, rate: Fraction):
    context = av.CodecContext.create(codec.encoder, "w")
    set_format(context, *size)
    context.framerate, context.time_base, context.thread_count = rate, 1 / rate, 1
    context.options = {**codec.options, "crf": f"{crf:g}"}
    packets = [packet for picture in (*pictures, None) for packet in context.encode(picture)]
    return tuple(SEI.sub(b"", bytes(packet)) if codec.decoder == "h264" else bytes(packet) for packet in packets)


def encode(clip: Clip, name: str, bits: float) -> Encoded:
    """A batch of one in as nearly `bits` bits as its codec's rate factor allows, and at most 2 % more.

    Of all rate factors that were tried, the one with the most bits that are not too many is taken. Where even the
    worst picture takes more, it is that one, with `reached` false. Pictures are 4:2:0 in BT.709. Raises ValueError
    for an unknown codec or one that is not in this build of FFmpeg.
    """
    codec = CODECS[check_codecs([name])[0]]
    rate = Fraction(clip.fps).limit_denominator(100_000)
    pictures = list(yuv_frames(to_uint8(clip.video[0]), rate))
    most = round(codec.worst / codec.step)
    tried: dict[int, Encoded] = {}
    try:
        for number in _search(tried, most, codec.halving / codec.step, bits):
            crf = number * codec.step
            tried[number] = Encoded(name, _packets(codec, pictures, clip.size, crf, rate), round(crf, 3))
    except (av.codec.codec.UnknownCodecError, av.error.FFmpegError) as error:
        raise ValueError(f"{codec.encoder} cannot encode here ({error}): leave {name} out of codecs") from None
    fitting = [encoded for encoded in tried.values() if encoded.bits <= (1 + TOLERANCE) * bits]
    if fitting:
        return min(fitting, key=lambda encoded: abs(encoded.bits - bits))
    least = min(tried.values(), key=lambda encoded: encoded.bits)
    return replace(least, reached=False)


def _search(tried: Mapping[int, Encoded], most: int, halving: float, bits: float) -> Iterable[int]:
    """Numbers 0 .. most to try, of which higher ones give fewer bits, until the best is among `tried`.

    The logarithm of the bits is nearly a straight line, so a step along it from the latest result lands close; the
    bracket that the results leave, halved after a few steps, makes sure of an end.
    """
    above, below = -1, most + 1  # the highest number known to give too many bits, the lowest known to give few enough
    number = most // 2
    while below - above > 1:
        if len(tried) < 6:
            number = min(max(number, above + 1), below - 1)
        else:
            number = (above + below) // 2
        yield number
        excess = tried[number].bits / bits
        if excess > 1 + TOLERANCE:
            above = number
        else:
            below = number
            if excess > 1 - NEAR:
                return
        number += round(halving * math.log2(excess)) or (1 if excess > 1 else -1)


def decode(encoded: Encoded, size: tuple[int, int]) -> Tensor:
    """The pictures of a stream, `(1, 3, T, H, W)` in [-1, 1], cut to the size they had before they were made even."""
    context = av.CodecContext.create(CODECS[encoded.codec].decoder, "r")
    context.thread_count = 1
    fitter = Fitter(None)
    packets = (*(av.Packet(packet) for packet in encoded.packets), None)
    frames = [fitter(frame) for packet in packets for frame in context.decode(packet)]
    video = torch.from_numpy(np.stack(frames)[:, : size[0], : size[1]].copy()).permute(3, 0, 1, 2)[None]
    return video.contiguous().float().div_(127.5).sub_(1)
