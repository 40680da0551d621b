"""What happens in a Zoetrope clip: one to three objects, a background and a camera, drawn from `(seed, split, index)`.

World units: the central square of the frame is [0, 1] x [0, 1], x to the right and y down, whatever the frame's size.
Times are seconds. The camera maps a world point `w` to the screen point `(w - centre) * zoom + 0.5`.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (228, 40, 40),
    "orange": (255, 136, 20),
    "yellow": (248, 226, 48),
    "green": (48, 200, 72),
    "cyan": (48, 214, 224),
    "blue": (56, 88, 248),
    "purple": (186, 64, 240),
    "white": (245, 245, 245),
}
SIZES = {"small": 0.1, "medium": 0.138, "large": 0.19}  # radius of a circle of about the same area
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "up right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "down left": (-math.sqrt(0.5), math.sqrt(0.5)),
    "down right": (math.sqrt(0.5), math.sqrt(0.5)),
}
MOTIONS = (
    "still", *DIRECTIONS, "bounce", "orbit clockwise", "orbit counter-clockwise",
    "spin", "grow", "shrink", "appear", "vanish",
)  # fmt: skip
# With a moving camera only motions that no camera can be mistaken for.
MOVING_CAMERA_MOTIONS = ("still", "bounce", "orbit clockwise", "orbit counter-clockwise", "spin", "appear", "vanish")
CAMERAS = ("static", "pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out")
BACKGROUNDS = ("plain", "gradient", "checker", "stars")
TEXTURED = ("checker", "stars")  # only these show that a camera moves
STYLES = ("flat", "outline", "pixel", "neon")
SPLITS = ("train", "validation", "compositional")

# Distance from a shape's centre to its farthest point, for the radius 1 (see render.distance).
REACH = {"circle": 1.0, "square": 1.25, "triangle": 1.45, "star": 1.4, "cross": 1.21, "heart": 1.18}

SMALLEST_SCALE = 0.4  # a growing object starts, and a shrinking one ends, at this share of its size
PAN = 0.32  # how far a panning camera travels in one clip, in frame heights
ZOOM = 1.5  # how much a zooming camera magnifies (or reduces) in one clip
_CANDIDATES = 12  # places tried at once for each object
_CHECKS = np.linspace(0, 1, 17)  # moments of the clip at which places are checked


@dataclass(frozen=True, slots=True)
class Object:
    """One object. What `rate`, `span` and `phase` mean depends on the motion.

    A direction moves `rate` a second; `bounce` jumps `span` high `rate` times a second; an orbit has the radius `span`
    and `rate` turns a second; `spin` turns `rate` a second (its sign is its sense); `grow` and `shrink` change the
    scale by `rate` a second; `appear` and `vanish` happen at the second `phase`. For bounces and orbits `phase` is the
    share of a period gone at time 0.
    """

    shape: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    rate: float = 0.0
    span: float = 0.0
    phase: float = 0.0
    depth: float = 0.7  # in [0, 1], 1 is near; the background is 0

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.motion


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything in one clip. `tone` chooses among the background's shades, `shift` is where its pattern starts."""

    objects: tuple[Object, ...]
    background: str = "plain"
    camera: str = "static"
    style: str = "flat"
    tone: int = 0
    shift: tuple[float, float] = (0.0, 0.0)
    seconds: float = 2.125


class Poses(NamedTuple):
    """Where objects are on the screen: arrays (objects, times) in world units and radians."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    visible: np.ndarray


def _held_out(shape: str, colour: str, motion: str) -> bool:
    return not (shape == "circle" and motion == "spin") and zlib.crc32(f"{shape} {colour} {motion}".encode()) % 12 == 0


# (shape, colour, motion) triples that only the compositional split contains: about 8 %.
HELD_OUT = frozenset(
    (shape, colour, motion)
    for shape in SHAPES
    for colour in COLOURS
    for motion in MOTIONS
    if _held_out(shape, colour, motion)
)
_HELD_OUT_BY_MOTIONS = {
    motions: tuple(triple for triple in sorted(HELD_OUT) if triple[2] in motions)
    for motions in (MOTIONS, MOVING_CAMERA_MOTIONS, ("still",))
}
_COLOUR_NAMES = tuple(COLOURS)


def camera_path(camera: str, seconds: float, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The camera's centre x, centre y and zoom at each of `times`; it starts at (0.5, 0.5, 1)."""
    x, y, zoom = np.full_like(times, 0.5), np.full_like(times, 0.5), np.ones_like(times)
    kind, _, way = camera.partition(" ")
    if kind == "pan":
        dx, dy = DIRECTIONS[way]
        x, y = x + dx * PAN / seconds * times, y + dy * PAN / seconds * times
    elif kind == "zoom":
        zoom = np.power(ZOOM if way == "in" else 1 / ZOOM, times / seconds)
    return x, y, zoom


def _own_path(motion: str, rate: float, span: float, phase: float, times: np.ndarray):
    """An object's own displacement (dx, dy) from its place at each time."""
    if motion in DIRECTIONS:
        dx, dy = DIRECTIONS[motion]
        return dx * rate * times, dy * rate * times
    if motion == "bounce":
        share = np.mod(rate * times + phase, 1.0)
        return np.zeros_like(times), -4 * span * share * (1 - share)
    if motion.startswith("orbit"):
        sense = 1.0 if motion == "orbit clockwise" else -1.0  # y points down, so growing angles turn clockwise
        angle = 2 * math.pi * (sense * rate * times + phase)
        return span * np.cos(angle), span * np.sin(angle)
    return np.zeros_like(times), np.zeros_like(times)


def poses(scene: Scene, times: np.ndarray) -> Poses:
    """Where every object is on the screen at each of `times` (seconds)."""
    times = np.asarray(times, np.float64)
    count = len(scene.objects)
    x, y = np.empty((count, len(times))), np.empty((count, len(times)))
    radius, angle = np.empty_like(x), np.zeros_like(x)
    visible = np.ones(x.shape, bool)
    centre_x, centre_y, zoom = camera_path(scene.camera, scene.seconds, times)
    for i, thing in enumerate(scene.objects):
        dx, dy = _own_path(thing.motion, thing.rate, thing.span, thing.phase, times)
        x[i] = (thing.x + dx - centre_x) * zoom + 0.5
        y[i] = (thing.y + dy - centre_y) * zoom + 0.5
        radius[i] = SIZES[thing.size] * zoom
        if thing.motion == "grow":
            radius[i] *= np.clip(SMALLEST_SCALE + thing.rate * times, SMALLEST_SCALE, 1)
        elif thing.motion == "shrink":
            radius[i] *= np.clip(1 - thing.rate * times, SMALLEST_SCALE, 1)
        elif thing.motion == "spin":
            angle[i] = 2 * math.pi * thing.rate * times
        elif thing.motion == "appear":
            visible[i] = times >= thing.phase
        elif thing.motion == "vanish":
            visible[i] = times < thing.phase
    return Poses(x, y, radius, angle, visible)


def bounce_times(thing: Object, seconds: float) -> list[float]:
    """The moments in [0, seconds) at which a bouncing object touches its floor."""
    if thing.motion != "bounce":
        return []
    first = (1.0 - thing.phase) % 1.0
    count = math.ceil(seconds * thing.rate - first)
    return [(first + i) / thing.rate for i in range(max(count, 0))]


@lru_cache(maxsize=1024)  # batches are first sorted by their captions, then drawn
def sample_scene(
    seed: int,
    split: str,
    index: int,
    *,
    still: bool = False,
    seconds: float = 2.125,
    moving_camera: float = 0.45,
    one_object: float = 0.45,
    only: tuple[str, ...] = (),
) -> Scene:
    """The scene numbered `index` of a split: the same arguments give the same scene on every machine.

    still: for images; every object is still and so is the camera. seconds: the time the motions are planned for.
    moving_camera: share of the scenes with a textured background in which the camera moves. one_object: share of the
    scenes with one object; of the others, six have two for five that have three. only: motions, where others are not
    wanted.
    Scenes of "train" and "validation" contain no triple of `HELD_OUT`, those of "compositional" at least one.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index, int(still)))
    rng = np.random.Generator(np.random.PCG64(sequence))
    count_draw, background_draw, camera_draw, style_draw, tone_draw, shift_x, shift_y, way_draw = rng.random(8).tolist()
    count = 1 if count_draw < one_object else 2 if count_draw < one_object + (1 - one_object) * 6 / 11 else 3
    background = BACKGROUNDS[int(background_draw * len(BACKGROUNDS))]
    camera = "static"
    if background in TEXTURED and not still and camera_draw < moving_camera:
        camera = CAMERAS[1 + int(way_draw * (len(CAMERAS) - 1))]
    if only and not set(only) & set(MOVING_CAMERA_MOTIONS):
        camera = "static"
    motions = ("still",) if still else MOTIONS if camera == "static" else MOVING_CAMERA_MOTIONS
    if only and not still:
        motions = tuple(motion for motion in motions if motion in only)

    objects: list[Object] = []
    for attempt in range(12):  # a crowd that does not fit is placed, and at times drawn, again
        if attempt % 4 == 0:
            triples = _sample_triples(rng, count, motions, split == "compositional")
        objects = _place(rng, triples, camera, seconds)
        if len(objects) == count:
            break
    return Scene(
        objects=tuple(objects),
        background=background,
        camera=camera,
        style=STYLES[int(style_draw * len(STYLES))],
        tone=int(tone_draw * 16),
        shift=(int(shift_x * 8) / 8, int(shift_y * 8) / 8),
        seconds=seconds,
    )


def _sample_triples(
    rng: np.random.Generator, count: int, motions: tuple[str, ...], held_out: bool
) -> list[tuple[str, str, str]]:
    """Shape, colour and motion of each object; no two share a colour."""
    colours = [_COLOUR_NAMES[i] for i in rng.permutation(len(_COLOUR_NAMES))[:count].tolist()]
    triples: list[tuple[str, str, str]] = []
    if held_out:
        choices = _HELD_OUT_BY_MOTIONS[motions]
        triples.append(choices[int(rng.random() * len(choices))])
        colours = [triples[0][1], *(colour for colour in colours if colour != triples[0][1])][:count]
    while len(triples) < count:
        shape_draw, motion_draw = rng.random(2).tolist()
        triple = (SHAPES[int(shape_draw * 6)], colours[len(triples)], motions[int(motion_draw * len(motions))])
        if not (triple[0] == "circle" and triple[2] == "spin") and (held_out or triple not in HELD_OUT):
            triples.append(triple)
    return triples


def _place(rng: np.random.Generator, triples: list[tuple[str, str, str]], camera: str, seconds: float) -> list[Object]:
    """Gives every triple a size and a path inside the frame that meets no other; stops at the first without room."""
    times = _CHECKS * seconds
    camera_x, camera_y, zoom = camera_path(camera, seconds, times)
    depths = (0.45 + (rng.permutation(len(triples)) + 0.5) / len(triples) * 0.5).round(3).tolist()
    placed: list[Object] = []
    paths: list[tuple[np.ndarray, np.ndarray, float]] = []
    names = tuple(SIZES)
    for (shape, colour, motion), depth in zip(triples, depths, strict=True):
        size_draw, rate_draw, span_draw, phase = rng.random(4).tolist()
        sizes = names[1:] if motion == "spin" else names  # a small shape's turning would be hard to see
        rate = span = 0.0
        if motion in DIRECTIONS:
            rate, phase = (0.34 + 0.16 * rate_draw) / seconds, 0.0
        elif motion == "bounce":
            rate, span = (2.2 + 0.6 * rate_draw) / 2.125, 0.24 + 0.08 * span_draw
        elif motion.startswith("orbit"):
            rate, span = (1.0 + 0.25 * rate_draw) / 2.125, 0.14 + 0.04 * span_draw
        elif motion == "spin":
            rate, phase = (0.25 + 0.1 * span_draw) * (1 if rate_draw < 0.5 else -1), 0.0
        elif motion in ("grow", "shrink"):
            rate, phase = (1 - SMALLEST_SCALE) / max(seconds - 0.125, seconds / 2), 0.0
        elif motion in ("appear", "vanish"):
            phase = (0.35 + 0.3 * phase) * seconds
        else:
            phase = 0.0
        dx, dy = _own_path(motion, rate, span, phase, times)
        places = rng.random((2, _CANDIDATES))
        for size in sizes[int(size_draw**0.65 * len(sizes)) :: -1]:  # what does not fit is made smaller
            reach = SIZES[size] * REACH[shape]
            edge = (0.92 * reach * zoom - 0.5) / zoom  # nearly all of the object stays in the frame
            low_x, high_x = (edge + camera_x - dx).max(), (camera_x - dx - edge).min()
            low_y, high_y = (edge + camera_y - dy).max(), (camera_y - dy - edge).min()
            if low_x > high_x or low_y > high_y:
                continue
            x, y = low_x + places[0] * (high_x - low_x), low_y + places[1] * (high_y - low_y)
            free = np.ones(_CANDIDATES, bool)
            for other_x, other_y, other_reach in paths:  # zoom cancels out: compare world paths
                apart = np.hypot(x + (dx - other_x)[:, None], y + (dy - other_y)[:, None]).min(0)
                free &= apart > reach + other_reach
            chosen = int(free.argmax())
            if free[chosen]:
                here = float(x[chosen]), float(y[chosen])
                placed.append(Object(shape, colour, size, motion, *here, rate, span, phase, depth))
                paths.append((here[0] + dx, here[1] + dy, reach))
                break
        else:
            break
    return placed
