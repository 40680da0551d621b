"""What is said about a Zoetrope scene, and what a sentence says about a scene.

Every attribute value has a few phrasings, and no phrase of one value is part of a phrase of another kind, so that
`parse` reads every caption (and most free prompts in the same words) back into attributes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from reelm.data.zoetrope.scene import Object, Scene

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
}
COLOUR_WORDS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "middle sized"), "large": ("large", "big")}
MOTION_WORDS = {
    "still": ("stays still", "stands still", "does not move"),
    "left": ("moves left", "moves to the left", "goes left"),
    "right": ("moves right", "moves to the right", "goes right"),
    "up": ("moves up", "goes up", "rises"),
    "down": ("moves down", "goes down", "falls"),
    "up left": ("moves up and left", "goes up and left"),
    "up right": ("moves up and right", "goes up and right"),
    "down left": ("moves down and left", "goes down and left"),
    "down right": ("moves down and right", "goes down and right"),
    "bounce": ("bounces", "jumps up and down"),
    "orbit clockwise": ("circles clockwise", "orbits clockwise"),
    "orbit counter-clockwise": ("circles counter-clockwise", "orbits counter-clockwise"),
    "spin": ("spins", "turns in place"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "appear": ("appears", "pops up"),
    "vanish": ("vanishes", "disappears"),
}
CAMERA_WORDS = {
    "pan left": ("the camera pans left", "the camera moves left"),
    "pan right": ("the camera pans right", "the camera moves right"),
    "pan up": ("the camera pans up", "the camera moves up"),
    "pan down": ("the camera pans down", "the camera moves down"),
    "zoom in": ("the camera zooms in",),
    "zoom out": ("the camera zooms out",),
    "static": ("the camera is still", "the camera does not move"),
}
BACKGROUND_WORDS = {
    "plain": ("on a plain background", "on a bare background"),
    "gradient": ("on a gradient background", "on a shaded background"),
    "checker": ("on a checkered background", "on a checkerboard"),
    "stars": ("on a starry background", "on a night sky"),
}
STYLE_WORDS = {
    "flat": ("in flat style",),
    "outline": ("in outline style",),
    "pixel": ("in pixel style",),
    "neon": ("in neon style",),
}
_JOINS = (" and ", " while ", ", ")


@dataclass(frozen=True, slots=True)
class Asked:
    """One object as a sentence states it; None where the sentence leaves it open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    motion: str | None = None


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a sentence asks for; None (or no objects) where it asks for nothing."""

    objects: tuple[Asked, ...] = ()
    background: str | None = None
    camera: str | None = None
    style: str | None = None

    @staticmethod
    def of(scene: Scene, *, image: bool = False) -> Attributes:
        """Everything that is true of a scene (of a single frame of it, which shows no motion, with `image`)."""
        return Attributes(
            objects=tuple(Asked(o.shape, o.colour, o.size, None if image else o.motion) for o in scene.objects),
            background=scene.background,
            camera=None if image else scene.camera,
            style=scene.style,
        )


def caption(scene: Scene, rng: np.random.Generator | int, full: bool = True, image: bool = False) -> str:
    """A lower-case sentence about the scene.

    rng: draws the phrasing (a number is a seed). full: tell sizes, background, style and a moving camera too, not only
    colours, shapes and motions. image: tell nothing that takes time.
    """
    if not isinstance(rng, np.random.Generator):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(rng, spawn_key=(99,))))
    draws = iter(rng.random(24).tolist())

    def pick(phrases: tuple[str, ...]) -> str:
        return phrases[int(next(draws) * len(phrases))]

    def describe(thing: Object) -> str:
        words = [pick(SIZE_WORDS[thing.size])] if full else []
        words += [pick(COLOUR_WORDS[thing.colour]), pick(SHAPE_WORDS[thing.shape])]
        article = "an" if words[0][0] in "aeiou" else "a"
        motion = [] if image else [pick(MOTION_WORDS[thing.motion])]
        return " ".join([article, *words, *motion])

    told = [describe(thing) for thing in scene.objects]
    if len(told) == 3:
        text = f"{told[0]}, {told[1]} and {told[2]}"
    else:
        text = (" and " if image else pick(_JOINS)).join(told)
    if full:
        text += " " + pick(BACKGROUND_WORDS[scene.background])
        if scene.camera != "static" and not image:
            text += ", " + pick(CAMERA_WORDS[scene.camera])
        text += ", " + pick(STYLE_WORDS[scene.style])
    return text


def _reader(*groups: dict[str, tuple[str, ...]]) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that finds the phrases of all groups, longest first, and the value that each phrase stands for."""
    value_of = {phrase: value for group in groups for value, phrases in group.items() for phrase in phrases}
    phrases = sorted(value_of, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, phrases)) + r")(?![\w-])"), value_of


_SHAPE, _COLOUR, _SIZE = _reader(SHAPE_WORDS), _reader(COLOUR_WORDS), _reader(SIZE_WORDS)
_MOTION, _CAMERA = _reader(MOTION_WORDS), _reader(CAMERA_WORDS)
_BACKGROUND = _reader(BACKGROUND_WORDS, {"plain": ("plain background",), "gradient": ("gradient background",)})
_STYLE = _reader(STYLE_WORDS, {style: (f"{style} style",) for style in STYLE_WORDS})


def _first(reader: tuple[re.Pattern[str], dict[str, str]], text: str) -> str | None:
    found = reader[0].search(text)
    return reader[1][found.group(1)] if found else None


def parse(text: str) -> Attributes:
    """The attributes a caption or a free prompt states: `parse(caption(scene, ...))` gives back what was told.

    A shape's noun makes an object; the adjectives before it and the verb after it, up to the next noun, belong to it.
    """
    text = " ".join(text.lower().split())
    camera, background, style = _first(_CAMERA, text), _first(_BACKGROUND, text), _first(_STYLE, text)
    for reader in (_CAMERA, _BACKGROUND, _STYLE):
        text = reader[0].sub(" ; ", text)
    nouns = list(_SHAPE[0].finditer(text))
    objects = []
    for i, noun in enumerate(nouns):
        before = text[nouns[i - 1].end() if i else 0 : noun.start()]
        after = text[noun.end() : nouns[i + 1].start() if i + 1 < len(nouns) else len(text)]
        objects.append(
            Asked(_SHAPE[1][noun.group(1)], _first(_COLOUR, before), _first(_SIZE, before), _first(_MOTION, after))
        )
    return Attributes(tuple(objects), background, camera, style)
