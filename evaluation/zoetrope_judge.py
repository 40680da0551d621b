"""Scores a Zoetrope clip by the attributes that its prompt asked for.

A model's score means something beside `reference`, what the judge says of true clips and of true clips with the
captions of others, and beside the score of the tokenizer's reconstructions of true clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from reelm.data.zoetrope.captions import Attributes
from reelm.data.zoetrope.render import render
from reelm.data.zoetrope.scene import Scene, sample_scene
from reelm.evaluation.zoetrope_reading import Reading, Seen, read

__all__ = ["ATTRIBUTES", "Reading", "Seen", "evaluate", "read", "reference", "score"]

ATTRIBUTES = ("count", "colour", "shape", "size", "motion", "camera", "background", "style")


def score(reading: Reading, asked: Scene | Attributes) -> dict[str, tuple[int, int]]:
    """How many of the attributes that were asked for are there: name -> (right, asked), only those asked for.

    Objects are paired by colour alone (by the first attribute stated where no colour is), so that a clip with the right
    things in the wrong colours, or any clip with another's caption, is not flattered by the pairing.
    """
    if isinstance(asked, Scene):
        asked = Attributes.of(asked, image=reading.camera is None)
    result: dict[str, tuple[int, int]] = {}

    def note(name: str, right: bool) -> None:
        before = result.get(name, (0, 0))
        result[name] = before[0] + right, before[1] + 1

    if asked.objects:
        note("count", reading.count == len(asked.objects))
    for want, seen in zip(asked.objects, _paired(reading.objects, asked), strict=True):
        for name in ("colour", "shape", "size", "motion"):
            value = getattr(want, name)
            if value is not None and not (name == "motion" and reading.camera is None):
                note(name, seen is not None and getattr(seen, name) == value)
    for name in ("camera", "background", "style"):
        value = getattr(asked, name)
        if value is not None and getattr(reading, name) is not None:
            note(name, getattr(reading, name) == value)
    return result


def _paired(seen: Sequence[Seen], asked: Attributes) -> list[Seen | None]:
    """The seen object that stands for each asked one, or None: first those that agree, then the rest in order."""
    rest = list(seen)
    pairs: list[Seen | None] = []
    for want in asked.objects:
        name = next((name for name in ("colour", "shape", "motion", "size") if getattr(want, name) is not None), None)
        same = [i for i, one in enumerate(rest) if name is not None and getattr(one, name) == getattr(want, name)]
        pairs.append(rest.pop(same[0]) if same else None)
    return [rest.pop(0) if one is None and rest else one for one in pairs]


def evaluate(clips: Iterable[np.ndarray | Tensor], asked: Iterable[Scene | Attributes]) -> dict[str, float]:
    """The share of right attributes over clips and what each was asked to show, by attribute and over all ("all")."""
    return _shares(score(read(clip), want) for clip, want in zip(clips, asked, strict=True))


def _shares(scores: Iterable[dict[str, tuple[int, int]]]) -> dict[str, float]:
    totals: dict[str, np.ndarray] = {}
    for one in scores:
        for name, pair in one.items():
            totals[name] = totals.get(name, np.zeros(2)) + pair
    shares = {name: float(totals[name][0] / totals[name][1]) for name in ATTRIBUTES if name in totals}
    if totals:
        right, total = sum(totals.values())
        shares["all"] = float(right / total)
    return shares


def reference(
    count: int = 200, split: str = "validation", frames: int = 17, seed: int = 0
) -> dict[str, dict[str, float]]:
    """What the judge makes of `count` true clips ("true": 1 minus its own error), and of the same clips when each is
    asked to be the next ("shuffled": chance)."""
    scenes = [sample_scene(seed, split, i, still=frames == 1, seconds=frames / 8) for i in range(count)]
    readings = [read(render(scene, frames)) for scene in scenes]
    others = scenes[1:] + scenes[:1]
    return {
        "true": _shares(map(score, readings, scenes)),
        "shuffled": _shares(map(score, readings, others)),
    }
