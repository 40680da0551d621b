"""One id space for everything that the transformer reads and writes (VideoPoet, arXiv:2312.14125, appendix A.5.1)."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

SPECIAL = 256
TASKS = range(32, 64)
RESOLUTIONS = range(64, 96)
FRAME_RATES = range(96, 160)
DURATIONS = range(160, 224)


class Special(IntEnum):
    """Named ids of the special range. Those ending in _i delimit inputs, those in _o outputs."""

    pad = 0
    bos = 1
    eos = 2
    bot_i = 3
    eot_i = 4
    bov_i = 5
    eov_i = 6
    boa_i = 7
    eoa_i = 8
    source = 9
    res = 10
    bov_o = 11
    eov_o = 12
    boa_o = 13
    eoa_o = 14
    mask = 15
    text = 16  # a column whose vector comes from the sequence's embedded context
    null = 17  # reserved: what is left out for guidance is <pad>
    latent = 18  # a column whose vector is made of the sequence's latent


def _slot(slots: range, index: int, what: str) -> int:
    if not 0 <= index < len(slots):
        raise ValueError(f"{what} is {index}; there are special tokens for 0 to {len(slots) - 1}")
    return slots[index]


def task_token(index: int) -> int:
    """The id that names the kind of output wanted."""
    return _slot(TASKS, index, "the task's number")


def resolution_token(index: int) -> int:
    """The id of an output size other than the usual one."""
    return _slot(RESOLUTIONS, index, "the resolution's number")


def frame_rate_token(fps: float) -> int:
    """The id of a frame rate, rounded to whole frames a second."""
    return _slot(FRAME_RATES, round(fps), "the frame rate")


def duration_token(latent_frames: int) -> int:
    """The id of a length in latent frames."""
    return _slot(DURATIONS, latent_frames, "the number of latent frames")


class Vocabulary:
    """Special ids 0-255, then the ranges of visual, audio and text tokens, in this order.

    Args:
        visual: number of codes of the visual tokenizer.
        audio: number of audio codes over all residual levels (each level has ids of its own).
        text: number of word pieces; 0 where text comes embedded.
    """

    def __init__(self, visual: int, audio: int = 0, text: int = 0) -> None:
        if visual is None:
            raise ValueError(
                "this tokenizer's tokens are continuous: take head=per_token_diffusion, or a tokenizer with codes"
            )
        self.visual, self.audio, self.text = visual, audio, text
        for name in ("visual", "audio", "text"):
            if getattr(self, name) < 0:
                raise ValueError(f"the {name} range cannot have {getattr(self, name)} ids; give 0 or more")

    def __repr__(self) -> str:
        return f"Vocabulary(visual={self.visual}, audio={self.audio}, text={self.text})"

    @property
    def size(self) -> int:
        return SPECIAL + self.visual + self.audio + self.text

    @property
    def visual_range(self) -> range:
        return range(SPECIAL, SPECIAL + self.visual)

    @property
    def audio_range(self) -> range:
        return range(self.visual_range.stop, self.visual_range.stop + self.audio)

    @property
    def text_range(self) -> range:
        return range(self.audio_range.stop, self.audio_range.stop + self.text)

    def to_visual(self, codes: Tensor) -> Tensor:
        """Ids of this vocabulary from the visual tokenizer's codes."""
        return _shift(codes, self.visual_range, "visual", up=True)

    def from_visual(self, ids: Tensor) -> Tensor:
        """The visual tokenizer's codes from ids of this vocabulary."""
        return _shift(ids, self.visual_range, "visual", up=False)

    def to_audio(self, codes: Tensor) -> Tensor:
        return _shift(codes, self.audio_range, "audio", up=True)

    def from_audio(self, ids: Tensor) -> Tensor:
        return _shift(ids, self.audio_range, "audio", up=False)

    def to_text(self, pieces: Tensor) -> Tensor:
        return _shift(pieces, self.text_range, "text", up=True)

    def from_text(self, ids: Tensor) -> Tensor:
        return _shift(ids, self.text_range, "text", up=False)


def _shift(ids: Tensor, span: range, name: str, up: bool) -> Tensor:
    low, high = (0, len(span)) if up else (span.start, span.stop)
    if ids.numel() and ids.device.type == "cpu":  # elsewhere the check would wait for the device
        least, most = (int(value) for value in torch.aminmax(ids))
        if least < low or most >= high:
            raise ValueError(f"{name} ids reach from {least} to {most}; this vocabulary has {low} to {high - 1}")
    return ids + span.start if up else ids - span.start
