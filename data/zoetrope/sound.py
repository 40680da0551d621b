"""What a Zoetrope scene sounds like: every object is a voice, and every bounce a click."""

from __future__ import annotations

import math

import numpy as np

from reelm.data.zoetrope.scene import SIZES, Scene, bounce_times, poses

PITCHES = {"circle": 196.0, "square": 262.0, "triangle": 330.0, "star": 440.0, "cross": 554.0, "heart": 698.0}  # hertz
LOUDNESS = {"small": 0.08, "medium": 0.14, "large": 0.24}  # amplitude of a voice in the middle
_STEP = 0.01  # seconds between the moments at which loudness and pan are computed
_CLICK = 0.03  # seconds that a click rings


def sound(scene: Scene, seconds: float = 2.125, rate: int = 16_000) -> np.ndarray:
    """Stereo sound, float32 (2, N) in [-1, 1], N = seconds * rate rounded.

    A voice has the pitch of its object's shape and the loudness of its size (also while it grows or shrinks), and comes
    from where the object is: full left at the left edge, full right at the right, constant power between. It is silent
    while the object is. A click, higher than any voice, sounds where and when an object bounces.
    """
    count = round(seconds * rate)
    clock = np.arange(count) / rate
    marks = np.arange(0, seconds + 2 * _STEP, _STEP)
    place = poses(scene, marks)
    mixed = np.zeros((2, count))
    for i, thing in enumerate(scene.objects):
        loud = LOUDNESS[thing.size] * place.radius[i] / SIZES[thing.size] * place.visible[i]
        angle = np.clip(place.x[i], 0, 1) * (math.pi / 2)
        voice = np.sin(2 * math.pi * PITCHES[thing.shape] * clock + i)
        for side, share in enumerate((np.cos(angle), np.sin(angle))):
            mixed[side] += np.interp(clock, marks, loud * share) * voice
        for when in bounce_times(thing, seconds):
            first = math.ceil(when * rate)
            since = clock[first : first + round(_CLICK * rate)] - when
            at = np.interp(when, marks, angle)
            click = 0.35 * np.exp(since * -150) * np.sin(2 * math.pi * 2400 * since)
            mixed[:, first : first + len(since)] += np.array([[math.cos(at)], [math.sin(at)]]) * click
    fade = np.minimum(1, np.minimum(clock, seconds - clock) / 0.01)  # no click at the ends
    return np.clip(mixed * fade, -1, 1).astype(np.float32)
