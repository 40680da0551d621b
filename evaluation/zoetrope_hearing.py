"""Reads the sound of a Zoetrope clip back into voices and bounces with plain signal processing, and scores it.

Objects of one shape have one pitch and so are one voice here. `hear` knows the world's pitches and looks at nothing but
samples: a least-squares fit of the six pitches to short pieces gives each voice's level on both sides over time, a
matched filter the clicks. `truth_of` says the same of a scene, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reelm.data.zoetrope.scene import SIZES, Scene, bounce_times, poses
from reelm.data.zoetrope.sound import LOUDNESS, PITCHES

ATTRIBUTES = ("voices", "pitch", "loudness", "pan", "begins and ends", "bounces", "bouncing")
HOP = 0.01  # seconds from one piece to the next
_PIECE = 0.08  # seconds of a piece
_HEARD = 0.016  # level above which a voice sounds: half of the softest one in the world
_VOICE = 0.04  # level that a voice reaches for a tenth of the time, or it is noise
_CLICK, _DECAY, _RING = 2400.0, 150.0, 0.03  # hertz, 1 / s and seconds of a click
_CLICK_LEVEL = 0.14  # a click begins with 0.35
_APART = 0.025  # clicks closer than this, in seconds, are one
_EDGE = 0.06  # seconds at both ends in which nothing is said to begin or end
_SAME = {"begins and ends": 0.05, "bounces": 0.03}  # seconds by which an event may be off
_LOUD, _PAN = 1.3, 0.1  # factor and share of the width by which a voice may be off, on the average


@dataclass(frozen=True, eq=False)
class Hearing:
    """What is heard in a clip.

    levels: `(6, 2, T)` of each pitch on the left and right, one every `HOP` seconds. clicks: seconds of each. changes:
    (second, pitch, 1 for begins or -1 for ends).
    """

    levels: np.ndarray
    clicks: tuple[float, ...]
    changes: tuple[tuple[float, int, int], ...]

    @property
    def loudness(self) -> np.ndarray:
        """`(6, T)`, whatever the side."""
        return np.sqrt(np.square(self.levels).sum(1))

    @property
    def voices(self) -> tuple[int, ...]:
        """Numbers of the pitches that sound."""
        loud = self.loudness
        return tuple(np.nonzero(np.quantile(loud, 0.9, axis=1) > _VOICE)[0].tolist()) if loud.shape[1] else ()

    @property
    def pan(self) -> np.ndarray:
        """`(6, T)`: 0 left, 1 right."""
        return np.arctan2(self.levels[:, 1], self.levels[:, 0]) * (2 / math.pi)


def hear(sound: np.ndarray | Tensor, rate: int = 16_000) -> Hearing:
    """Voices and clicks of a stereo sound (2, N)."""
    if isinstance(sound, Tensor):
        sound = sound.detach().cpu().numpy()
    if sound.ndim != 2 or sound.shape[0] != 2:
        raise ValueError(f"the judge hears one stereo sound (2, N); got {tuple(sound.shape)}: take clip.audio[i]")
    levels = _levels(sound.astype(np.float64), rate)
    return Hearing(levels, _clicks(sound.astype(np.float64), rate), _changes(levels, sound.shape[1] / rate))


def _levels(sound: np.ndarray, rate: int) -> np.ndarray:
    half = round(_PIECE / 2 * rate)
    clock = np.arange(-half, half + 1) / rate
    angle = 2 * np.pi * np.array(list(PITCHES.values()))[:, None] * clock
    waves = np.concatenate([np.cos(angle), np.sin(angle)])  # (12, n)
    window = np.hanning(len(clock) + 2)[1:-1]
    fit = np.linalg.solve((waves * window) @ waves.T, waves * window)  # weighted least squares
    count = int(sound.shape[1] / rate / HOP)
    starts = (np.arange(count) * HOP * rate).round().astype(int)
    padded = np.pad(sound, ((0, 0), (half, half + 1)))
    pieces = padded[:, starts[:, None] + np.arange(len(clock))]  # (2, T, n)
    parts = np.einsum("kn,ctn->kct", fit, pieces)
    return np.hypot(parts[: len(PITCHES)], parts[len(PITCHES) :])


def _clicks(sound: np.ndarray, rate: int) -> tuple[float, ...]:
    since = np.arange(round(_RING * rate)) / rate
    shape = np.exp(-since * _DECAY)
    template = shape * np.exp(2j * np.pi * _CLICK * since)
    size = 1 << (sound.shape[1] + len(template)).bit_length()
    found = np.fft.ifft(np.fft.fft(sound, size) * np.conj(np.fft.fft(template, size)))[:, : sound.shape[1]]
    level = np.sqrt(np.square(np.abs(found)).sum(0)) * 2 / np.square(shape).sum()
    times: list[int] = []
    for at in np.argsort(-level, kind="stable").tolist():  # the loudest first
        if level[at] < _CLICK_LEVEL:
            break
        if all(abs(at - other) >= _APART * rate for other in times):
            times.append(at)
    return _inside(tuple(sorted(at / rate for at in times)), sound.shape[1] / rate)


def _inside(times: tuple[float, ...], seconds: float) -> tuple[float, ...]:
    """Without those that the fades at the ends swallow."""
    return tuple(when for when in times if 0.01 < when < seconds - _RING)


def _changes(levels: np.ndarray, seconds: float) -> tuple[tuple[float, int, int], ...]:
    """Where a voice begins or ends: where its level passes half of what it is a piece later, or was a piece before."""
    found = []
    loud, span = np.sqrt(np.square(levels).sum(1)), round(_PIECE / HOP)
    for pitch, level in enumerate(loud):
        sounds = level > max(_HEARD, 0.12 * np.quantile(level, 0.9)) if np.quantile(level, 0.9) > _VOICE else None
        if sounds is None:
            continue
        sounds = _without_gaps(sounds, span)
        for at in np.nonzero(np.diff(sounds.astype(int)))[0].tolist():
            way = 1 if sounds[at + 1] else -1
            inner = min(max(at + way * span, 0), len(level) - 1)
            around = range(max(min(at, inner) - span, 0), min(max(at, inner) + span, len(level) - 1))
            passes = [t for t in around if (level[t] < level[inner] / 2) != (level[t + 1] < level[inner] / 2)]
            when = (min(passes, key=lambda t: abs(t - at)) + 0.5) * HOP if passes else at * HOP
            if _EDGE < when < seconds - _EDGE:
                found.append((when, pitch, way))
    return tuple(sorted(found))


def _without_gaps(sounds: np.ndarray, span: int) -> np.ndarray:
    """Stretches shorter than a piece are taken for what is around them."""
    sounds = sounds.copy()
    edges = [0, *(np.nonzero(np.diff(sounds.astype(int)))[0] + 1).tolist(), len(sounds)]
    for start, stop in zip(edges, edges[1:]):
        if stop - start < span and start > 0:
            sounds[start:stop] = sounds[start - 1]
    return sounds


def truth_of(scene: Scene, seconds: float = 2.125) -> Hearing:
    """What there is to be heard in a scene."""
    clock = np.arange(int(seconds / HOP)) * HOP
    place = poses(scene, clock)
    levels = np.zeros((len(PITCHES), 2, len(clock)), complex)
    for i, thing in enumerate(scene.objects):
        loud = LOUDNESS[thing.size] * place.radius[i] / SIZES[thing.size] * place.visible[i]
        angle = np.clip(place.x[i], 0, 1) * (math.pi / 2)
        levels[list(PITCHES).index(thing.shape)] += loud * np.stack([np.cos(angle), np.sin(angle)]) * np.exp(1j * i)
    seen, changes = poses(scene, np.arange(0, seconds, 0.001)).visible, []
    for pitch, shape in enumerate(PITCHES):
        sounds = seen[[i for i, thing in enumerate(scene.objects) if thing.shape == shape]].any(0)
        for at in np.nonzero(np.diff(sounds.astype(int)))[0].tolist():
            changes.append(((at + 1) * 0.001, pitch, 1 if sounds[at + 1] else -1))
    times = sorted(when for thing in scene.objects for when in bounce_times(thing, seconds))
    return Hearing(np.abs(levels), _inside(tuple(times), seconds), tuple(sorted(changes)))


def score(heard: Hearing, true: Hearing) -> dict[str, tuple[int, int]]:
    """How much of what there is to be heard is heard: name -> (right, asked).

    voices: whether there are as many. pitch: each voice that there is sounds. loudness, pan: of each voice, over the
    time in which it sounds. bounces, begins and ends: each in its time, one that is not there counting as wrong; two
    at once may be heard as one. bouncing: whether anything bounces.
    """
    result = {"voices": (int(len(heard.voices) == len(true.voices)), 1)}
    steps = min(heard.levels.shape[2], true.levels.shape[2])
    edge = round(_PIECE / 2 / HOP)
    right = {"pitch": 0, "loudness": 0, "pan": 0}
    for pitch in true.voices:
        sounds = true.loudness[pitch, :steps] > 0
        sounds = ~np.convolve(~sounds, np.ones(2 * edge + 1), "same").astype(bool)  # not where pieces are half silent
        sounds[:edge] = sounds[steps - edge :] = False
        if pitch not in heard.voices:
            continue
        right["pitch"] += 1
        loud = heard.loudness[pitch, :steps][sounds].mean() / true.loudness[pitch, :steps][sounds].mean()
        right["loudness"] += bool(1 / _LOUD < loud < _LOUD)
        off = np.abs(heard.pan[pitch, :steps] - true.pan[pitch, :steps])[sounds].mean()
        right["pan"] += bool(off < _PAN)
    if true.voices:
        result |= {name: (count, len(true.voices)) for name, count in right.items()}
    events = {
        "bounces": ([(when, 0, 0) for when in heard.clicks], [(when, 0, 0) for when in true.clicks]),
        "begins and ends": (list(heard.changes), list(true.changes)),
    }
    for name, (found, there) in events.items():
        if found or there:
            right, wrong = (_near(one, other, _SAME[name]) for one, other in ((there, found), (found, there)))
            result[name] = right, len(there) + len(found) - wrong
    result["bouncing"] = int(bool(heard.clicks) == bool(true.clicks)), 1
    return result


def _near(some: list[tuple[float, int, int]], others: list[tuple[float, int, int]], within: float) -> int:
    """How many of some events are among others."""
    return sum(any(one[1:] == other[1:] and abs(one[0] - other[0]) <= within for other in others) for one in some)


def picture(sound: Tensor, original: Tensor, rate: int, true: Hearing, width: int = 420) -> Tensor:
    """A sound over the truth, to look at: `(3, 1, 160, width)` in [-1, 1].

    Above the waveform, left side upwards and right side downwards, and as a blue outline that of the scene's own sound,
    with true bounces as red lines and heard ones as yellow ones; below a lane for each pitch, lowest first: what is
    heard filled, the truth as a line.
    """
    heard = hear(sound, rate)
    seconds, image = sound.shape[-1] / rate, np.full((160, width, 3), 20, np.uint8)
    columns = np.minimum((np.arange(width + 1) / width * sound.shape[-1]).astype(int), sound.shape[-1] - 1)
    waves = [np.abs(each.detach().cpu().numpy()).clip(0, 1) for each in (sound, original)]
    for x in range(width):
        (up, down), (true_up, true_down) = (
            [int(32 * side[columns[x] : columns[x + 1] + 1].max(initial=0)) for side in wave] for wave in waves
        )
        image[32 - up : 33 + down, x] = 150
        image[[32 - true_up, 32 + true_down], x] = (90, 150, 240)
    for clicks, colour, rows in (
        (true.clicks, (230, 60, 60), slice(0, 32)),
        (heard.clicks, (240, 220, 60), slice(33, 65)),
    ):
        for when in clicks:
            image[rows, min(int(when / seconds * width), width - 1)] = colour
    for pitch in range(len(PITCHES)):
        floor = 80 + 16 * pitch - 1
        image[floor, :] = 60
        for x in range(width):
            t = int(x / width * seconds / HOP)
            levels = [each.loudness[pitch, min(t, each.levels.shape[2] - 1)] for each in (heard, true)]
            tall, line = (min(int(level * 40), 14) for level in levels)
            image[floor - tall : floor, x] = 110
            if line:
                image[floor - line, x] = (80, 220, 120)
    return torch.from_numpy(image).permute(2, 0, 1)[:, None].float() / 127.5 - 1
