"""What a task's clip is to show and to let hear in Zoetrope, and how much of it does: for `evaluate`, and as a reward
to learn from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.data.zoetrope.captions import Asked, Attributes, parse
from reelm.evaluation.zoetrope_hearing import ATTRIBUTES as AUDIBLE
from reelm.evaluation.zoetrope_hearing import Hearing, hear
from reelm.evaluation.zoetrope_hearing import score as sound_score
from reelm.evaluation.zoetrope_judge import score
from reelm.evaluation.zoetrope_reading import Reading, read
from reelm.tasks.known_frames import Loop
from reelm.tasks.task import Given, Task
from reelm.tasks.with_sound import WithSound

TOLD_BY_PROMPTS = ("voices", "pitch", "bouncing")  # where and when voices sound, prompts leave open
CLEAN = 30.0  # decibels at which known pixels are as good as they get: about what the tokenizer keeps of them

Counts = dict[str, tuple[int, int]]
"""Attribute -> (right, asked)."""


def sensible(reading: Reading) -> bool:
    """Whether a clip made from nothing shows a world that could be: one to three objects of different colours."""
    colours = [thing.colour for thing in reading.objects]
    return 1 <= len(colours) <= 3 and len(set(colours)) == len(colours)


def changes(loop: Tensor) -> Tensor:
    """`(B, T)`: how much is different from each frame of `(B, 3, T, H, W)` to the next, the first one following the
    last."""
    return (loop.roll(-1, 2) - loop).abs().mean((1, 3, 4))


def _usual(changed: Tensor) -> Tensor:
    return changed[:, :-1].median(1).values


def closes(changed: Tensor) -> Tensor:
    """`(B,)` bool: whether clips with these `changes` can be played again and again without a jump: from the last frame
    to the first at most twice as much is different as between two others (the median)."""
    return changed[:, -1] <= 2 * _usual(changed)


def even(changed: Tensor) -> Tensor:
    """`(B,)` bool: whether no step of a loop is such a jump: it also does not hurry back before its end."""
    return changed.amax(1) <= 2 * _usual(changed)


def asked(task: Task, caption: str) -> Attributes:
    """What a task's clip is to show: what its caption says, but for what the task leaves out or changes."""
    told = parse(caption)
    if isinstance(task, Loop):  # motions lead back, so they are no longer what they were
        return replace(told, objects=tuple(replace(one, motion=None) for one in told.objects), camera=None)
    if isinstance(task, WithSound) and not task.prompted:  # sound tells shapes by pitch and sizes by loudness
        return Attributes(tuple(Asked(one.shape, size=one.size) for one in told.objects))
    return told


def audible(given: Given) -> tuple[str, ...]:
    """The attributes of sound that what is given decides."""
    return AUDIBLE if given.known is not None else TOLD_BY_PROMPTS


def heard_right(made: Hearing, true: Hearing, given: Given) -> Counts:
    """What of a sound is right, of the attributes that what is given decides."""
    return {name: count for name, count in sound_score(made, true).items() if name in audible(given)}


def _share(counts: Counts) -> float | None:
    total = sum(count for _, count in counts.values())
    return sum(right for right, _ in counts.values()) / total if total else None


@dataclass(frozen=True)
class ZoetropeReward:
    """How much of what clips are to show and to let hear the judges find in them, for each from 0 to 1 + `whole`.

    It is the mean over pictures, sound, known pixels and, of a loop, whether it moves and runs evenly: of each the
    share that is right. Pictures are asked for what the caption says, without a prompt for a sensible scene; sound for
    what is heard in the true clip, where that follows from what is given.

    whole: what a clip gets more if the judges find no mistake at all.
    """

    whole: float = 0.5

    def __call__(self, task: Task, given: Given, target: Clip, made: Clip) -> Tensor:
        """`(B,)` for clips made of what is given, beside the true ones."""
        heard: dict[str, Hearing] = {}  # of the true clips, of which each has several samples
        kept, rewards = self._kept(given, made), []
        for i in range(len(made)):
            judged = self._judged(task, given, target[i], made[i], heard)
            parts = judged if kept is None else [*judged, float(kept[i])]
            rewards.append(sum(parts) / len(parts) + self.whole * (min(judged) == 1))
        return torch.tensor(rewards)

    @staticmethod
    def _judged(task: Task, given: Given, target: Clip, made: Clip, heard: dict[str, Hearing]) -> list[float]:
        """The share that is right of each part of one clip that a judge looks at or hears."""
        shares = []
        if "video" in given.asks:
            reading = read(made.video[0])
            if getattr(task, "prompted", True) or isinstance(task, WithSound):
                shares.append(_share(score(reading, asked(task, target.captions[0]))))
            else:
                shares.append(float(sensible(reading)))
            if isinstance(task, Loop):  # what stands still runs evenly, too, but not where something is to move
                changed, true = changes(made.video[:, :, :-1]), changes(target.video[:, :, :-1])
                shares.append(float(even(changed) & (3 * _usual(changed) >= _usual(true))))
        if "audio" in given.asks:
            key = target.keys[0]
            if key not in heard or not key:
                heard[key] = hear(target.audio[0].expand(2, -1), target.audio_rate)
            played = hear(made.audio[0].expand(2, -1), made.audio_rate)
            shares.append(_share(heard_right(played, heard[key], given)))
        if None in shares:
            raise ValueError(
                f"this reward is for captions in Zoetrope's words; {target.captions[0]!r} asks for nothing"
            )
        return shares

    @staticmethod
    def _kept(given: Given, made: Clip) -> Tensor | None:
        """`(B,)` from 0 to 1: how near the known pixels beyond a clip's first frames are, or None where there are
        none. Those of the first frames stay as they are whatever is made."""
        leading = given.leading
        if "video" not in given.asks or given.known is None or given.known.shape[2] != made.frames:
            return None
        known = given.known[:, :, leading:].to(made.video.device)
        if not known.any():
            return None
        known = known.expand(len(made), 3, -1, -1, -1)
        true = given.video[:, :, leading:].to(made.video.device).expand_as(known)
        error = ((made.video[:, :, leading:] - true) * known).square().flatten(1).sum(1) / known.flatten(1).sum(1)
        return (10 * torch.log10(4 / error.clamp_min(1e-10)) / CLEAN).clamp(0, 1).cpu()
