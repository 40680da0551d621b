"""Scores a Zoetrope clip by the attributes that its prompt asked for.

A model's score means something beside what the judge says of true clips, of the model's clips with the captions of
others, and of the tokenizer's reconstructions of true clips.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelm.data.zoetrope.captions import Attributes
from reelm.data.zoetrope.scene import Scene
from reelm.evaluation.zoetrope_reading import Reading, Seen

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


class Tally:
    """Counts of right answers by attribute, over all scenes and over those of one object."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = {}

    def add(self, reading: Reading, asked: Scene | Attributes) -> None:
        self.note(score(reading, asked), single=len(asked.objects) == 1)

    def note(self, counts: dict[str, tuple[int, int]], single: bool) -> None:
        """Counts in what `score` gives; single: of a scene of one object."""
        for name, (right, total) in counts.items():
            for scenes in ("all", "one object") if single else ("all",):
                for attribute in (name, "all"):
                    count = self.counts.setdefault((scenes, attribute), [0, 0])
                    count[0] += right
                    count[1] += total

    def shares(self) -> dict[str, dict[str, float]]:
        """`{"all": {attribute: share}, "one object": {...}}`; the attribute "all" is over all attributes."""
        result: dict[str, dict[str, float]] = {}
        for (scenes, attribute), (right, total) in self.counts.items():
            result.setdefault(scenes, {})[attribute] = round(right / total, 4)
        return result
