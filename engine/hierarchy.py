"""Key frames first, then what lies between them (CogVideo, arXiv:2205.15868, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.engine import seeds
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs
from reelm.engine.interruption import Windows
from reelm.engine.video_model import VideoModel
from reelm.tasks.task import Given

BETWEEN = "key_frames"  # the task that fills in every second frame
TASKS = ("t2v", "unconditional", "i2v", "continuation")  # by which key frames are made


def make_in_stages(
    model: VideoModel,
    task: str,
    inputs: Inputs,
    stages: int,
    frames: int | None = None,
    samples: int = 1,
    seed: int = 0,
    sampling: Any = None,
    progress: Callable[[int, int], None] | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    made: list[list[Tensor]] | None = None,
    **options: Any,
) -> Clip:
    """Clips whose key frames are made one after the other, at a rate that each stage then doubles.

    task, inputs: for the key frames. stages: how often the frames between those there are are filled in; the key frames
        are made at `fps / 2**stages`. frames: of the result; None: what the key frames of one window become.
    Other arguments are those of `generation.make`. Raises ValueError where the model does not know the task between
    frames, or one of the rates.
    """
    if BETWEEN not in model.tasks or model.formats is None:
        raise ValueError(
            f"stages={stages} needs a model that was trained for the task {BETWEEN} at several frame rates "
            "(system=cogvideo); this one was not: leave it out"
        )
    if stages < 1 or task not in TASKS:
        raise ValueError(f"stages is 1 or more, with task={', '.join(TASKS)}; got stages={stages}, task={task}")
    fps = fps or model.fps
    rates = [fps / 2**stage for stage in reversed(range(stages + 1))]
    forms = [model.fitting(None, size, rate) for rate in rates]  # an unknown rate is told before anything is made
    windows = Windows(made)
    keys = None if frames is None else -(-(frames - 1) // 2**stages) + 1
    clip = make(
        model, task, inputs, keys, samples, seed, sampling, progress=progress, size=size, fps=rates[0], made=windows,
        **options,
    )  # fmt: skip
    for stage, form in enumerate(forms[1:], 1):

        def generate(given: Given, number: int, first: int = seed + stage * seeds.STAGE) -> Tensor:
            draw = first + number * seeds.WINDOW
            return model.generate(given, BETWEEN, sampling, draw, progress, **windows.next()).video.to("cpu")

        clip = between(clip, form.frames, form.fps, generate)
    return clip.replace(video=clip.video[:, :, :frames])


def between(clip: Clip, window: int, fps: float, generate: Callable[[Given, int], Tensor]) -> Clip:
    """A clip at twice its rate, whose own frames stay as they are.

    window: frames that the model makes at once, every second of which is known. generate: makes them `(B, 3, window, H,
        W)` for what is given and the number of the window.
    """
    span, keys = (window - 1) // 2, clip.video
    if span < 1:
        raise ValueError(
            f"windows of {window} frames have none between two others; the model needs formats of 3 or more"
        )
    last = keys.shape[2] - 1
    shape = (keys.shape[0], 3, 2 * last + 1, *clip.size)
    video = torch.empty(shape)
    video[:, :, ::2] = keys
    starts = list(range(0, max(last - span, 0), span)) + [max(last - span, 0)]
    for number, start in enumerate(starts):
        index = torch.arange(start, start + span + 1).clamp_max(last)  # a short clip ends with its last frame repeated
        told = torch.zeros(len(keys), 3, window, *clip.size)
        known = torch.zeros(len(keys), 1, window, *clip.size, dtype=torch.bool)
        told[:, :, : 2 * span + 1 : 2], known[:, :, : 2 * span + 1 : 2] = keys[:, :, index], True
        given = Given((window, *clip.size), clip.captions, told, known, fps=fps)
        count = min(span, last - start)
        made = generate(given, number)[:, :, 1 : 2 * count : 2]
        video[:, :, 2 * start + 1 : 2 * (start + count) : 2] = made
    return Clip(video, fps, clip.captions)
