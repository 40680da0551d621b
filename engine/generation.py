"""From what a user has to clips of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.engine import seeds
from reelm.engine.inputs import Inputs, at_ends, first_given, order_of, overlap, whole_length
from reelm.engine.interruption import Windows
from reelm.engine.video_model import VideoModel
from reelm.tasks.formats import Format
from reelm.tasks.task import Given

# what goes on window by window
ENDLESS = ("t2v", "unconditional", "i2v", "continuation", "backward", "t2av", "av_continuation")


def make(
    model: VideoModel,
    task: str,
    inputs: Inputs,
    frames: int | None = None,
    samples: int = 1,
    seed: int = 0,
    sampling: Any = None,
    keep_known: bool = True,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    made: list[list[Tensor]] | Windows | None = None,
    actions: Sequence[int] | None = None,
) -> Clip:
    """Clips for a user's inputs.

    frames: length of the result; beyond what the model makes at once, each further window continues the last second of
        the one before (backward continuation: comes before its first second). A loop is one frame shorter: after its
        last frame it begins anew.
    seed: sample i draws with seed + i, each window with another noise (`seeds.py`).
    keep_known: known pixels stay as they were given, instead of as the tokenizer shows them.
    size, fps: of the result, where the model makes several.
    made: for language models, a list that is filled with the tokens of each window, in pieces `(B, k)`; one that was
        filled by a call that was interrupted is gone on from.
    actions: of a model that is played by them, for each latent frame after those that are known, or after the first;
        None: drawn.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames={frames}; give 1 or more")
    windows = made if isinstance(made, Windows) else Windows(made)

    def generate(given: Given, task: str, seed: int) -> Clip:
        nonlocal actions
        if actions is not None:  # of this window; frames beyond what was asked for, which are cut off, repeat the last
            count = model.frames_played(given)
            played = torch.tensor([*actions[:count], *actions[-1:] * max(count - len(actions), 0)])
            given, actions = given.replace(actions=played.expand(len(given), -1).to(model.device)), actions[count:]
        return model.generate(given, task, sampling, seed, progress, **windows.next()).to("cpu")

    form, frames = lengths(model, task, frames, size, fps, note)
    given = first_given(model, task, inputs, form, samples, frames)
    if actions is not None:
        actions = _checked(actions, model, task, given, frames)
    clip = generate(given, task, seed)
    if keep_known and given.video is not None:
        count = given.video.shape[2]
        part = torch.where(given.known, given.video, clip.video[:, :, :count])
        clip = clip.replace(video=torch.cat([part, clip.video[:, :, count:]], 2))
    while clip.frames < frames:
        seed += seeds.WINDOW
        clip = _longer(model, task, clip, frames, form, partial(generate, seed=seed))
    video = clip.video[:, :, -frames:] if task == "backward" else clip.video[:, :, :frames]
    audio = None if clip.audio is None else clip.audio[..., : round(frames / form.fps * clip.audio_rate)]
    return clip.replace(video=video[:, :, :-1] if task == "loop" else video, audio=audio)


def lengths(
    model: VideoModel,
    task: str,
    frames: int | None,
    size: tuple[int, int] | None,
    fps: float | None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Format, int]:
    """What a model makes at once for a task, and how many frames the result has; ValueError where it cannot have so
    many."""
    length, step = model.task(task).frames, model.tokenizer.compression[0]
    frames = length or (None if frames is None else whole_length(frames, step, note))
    form = model.fitting(frames, size, fps)
    form = form if length is None else replace(form, frames=length)
    frames = frames or form.frames
    if frames > form.frames and task not in ENDLESS:
        raise ValueError(f"task={task} makes clips of up to {form.frames} frames with this model; got {frames}")
    if frames < form.frames and task in ("interpolation", "connection", "loop"):
        raise ValueError(f"task={task} makes clips of {form.frames} frames with this model; got {frames}")
    if frames <= step and task in ("i2v", "continuation", "backward", "av_continuation"):
        raise ValueError(f"task={task} with frames={frames} would make nothing new; ask for {1 + step} or more")
    return form, frames


def _checked(actions: Sequence[int], model: VideoModel, task: str, given: Given, frames: int) -> list[int]:
    """The actions of a whole clip; ValueError where they are not as many as it takes, or cannot be told."""
    if getattr(model, "actions", None) is None:
        raise ValueError("this model is not played by actions; leave actions=... out")
    if task not in ("t2v", "unconditional", "i2v", "continuation"):
        raise ValueError(f"task={task} is not played by actions; leave actions=... out")
    count = model.frames_played(given.replace(shape=(frames, *given.shape[1:])))
    if len(actions) != count:
        raise ValueError(
            f"actions has {len(actions)} numbers; this clip takes {count}, one for each latent frame to make"
        )
    if wrong := [action for action in actions if action not in range(model.actions.codes)]:
        raise ValueError(f"actions are numbers from 0 to {model.actions.codes - 1}; got {wrong[0]}")
    return list(actions)


def _longer(
    model: VideoModel,
    task: str,
    clip: Clip,
    frames: int,
    form: Format,
    generate: Callable[[Given, str], Clip],
) -> Clip:
    """A clip that is to have `frames` frames with one more window after its end, or before its beginning."""
    further_task = "continuation" if clip.audio is None else "av_continuation"
    if task != "backward" and further_task in model.tasks:
        task = further_task
    shared = overlap(model, form, task)
    if model.formats is None:  # else it knows whole formats alone
        form = replace(form, frames=min(form.frames, shared + frames - clip.frames))
    given = Given(form.shape, clip.captions, fps=form.fps)
    if task == "backward":
        video, known = at_ends(form, None, clip.video[:, :, :shared])
        known = known.expand(len(clip), -1, -1, -1, -1)
        given = given.replace(video=video, known=known, order=order_of(model, task))
        further = generate(given, task).video
        return clip.replace(video=torch.cat([further[:, :, :-shared], clip.video], 2))
    video = clip.video[:, :, -shared:]
    given = given.replace(video=video, known=torch.ones_like(video[:, :1], dtype=torch.bool))
    if clip.audio is None:
        further = generate(given, task).video
        return clip.replace(video=torch.cat([clip.video, further[:, :, shared:]], 2))
    heard = round(shared / form.fps * clip.audio_rate)
    given = given.replace(audio=clip.audio[..., -heard:], audio_rate=clip.audio_rate, asks=("video", "audio"))
    further = generate(given, task)
    return clip.replace(
        video=torch.cat([clip.video, further.video[:, :, shared:]], 2),
        audio=torch.cat([clip.audio, further.audio[..., heard:]], 2),
    )
