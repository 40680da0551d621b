"""Draws Zoetrope scenes: anti-aliased, at any size, length and frame rate, in any of the four styles.

Shapes are signed distance functions evaluated on the union of an object's boxes over all frames; arrays stay planar
`(3, T, H, W)` float32 until the last step, because numpy is several times slower with a last axis of 3.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from reelm.data.zoetrope.scene import COLOURS, REACH, Poses, Scene, camera_path, poses

BLOCKS = 32  # pixel style: blocks along the shorter side of the frame
STROKE = 0.028  # width of a line in the outline and neon styles, in frame heights
GLOW = 0.035  # neon light falls to 1 / e over this distance
CELL = 1 / 8  # side of a checker cell
DOT = 0.014  # standard deviation of a star of the background
_TINTS = ((1.0, 1.0, 1.0), (1.08, 1.0, 0.92), (0.92, 1.0, 1.1), (0.96, 1.05, 0.98))
_NEON_DIM = 0.5
_MIDDLES = {"triangle": (0.5, 0.0), "star": (0.5, 0.5), "heart": (0.5, 0.5)}


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside, v down) to a shape of radius 1; lines meet in mitred corners."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88
    if shape == "triangle":
        return np.maximum(np.maximum(np.abs(u) * 0.8660254 - v * 0.5, v) - 0.725, np.sqrt(u * u + v * v) - 1.45)
    if shape == "cross":
        u, v = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(u - 1.12, v - 0.46), np.maximum(u - 0.46, v - 1.12))
    if shape == "star":
        return _star(u, v)
    if shape == "heart":
        return _heart(u, v)
    raise ValueError(f"unknown shape {shape!r}")


def _star(u: np.ndarray, v: np.ndarray, outer: float = 1.4, inner: float = 0.7) -> np.ndarray:
    circle = np.sqrt(u * u + v * v) - outer  # ends the mitred tips, which neon light would lengthen
    # mirrors fold the plane onto the wedge of 36 degrees right of the upper tip; one line bounds the star there
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    u, v = np.abs(u), -v
    beyond = 2 * np.maximum(cos * u - sin * v, 0)
    u, v = u - cos * beyond, v + sin * beyond
    beyond = 2 * np.maximum(-cos * u - sin * v, 0)
    u, v = np.abs(u + cos * beyond), v + sin * beyond
    along_u, along_v = inner * sin, inner * cos - outer
    length = math.hypot(along_u, along_v)
    return np.maximum((v - outer) * (along_u / length) - u * (along_v / length), circle)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # two discs on the upper sides of a square that stands on its corner
    scale = 1.85
    u, v = np.abs(u) / scale, 0.58 - v / scale
    lobe = np.sqrt((u - 0.25) ** 2 + (v - 0.75) ** 2) - math.sqrt(0.125)
    total = u + v
    foot = np.maximum(total, 0) * 0.5
    side = np.sqrt(np.minimum(u * u + (v - 1) ** 2, (u - foot) ** 2 + (v - foot) ** 2)) * np.sign(u - v)
    return np.where(total > 1, lobe, side) * np.float32(scale)


@lru_cache(maxsize=64)
def pixel_axis(pixels: int, unit: int) -> np.ndarray:
    """World coordinates of the pixel centres along one side."""
    return ((np.arange(pixels) + 0.5 - pixels / 2) / unit + 0.5).astype(np.float32)


@lru_cache(maxsize=1)
def _constellation() -> np.ndarray:
    """(3, stars): x, y in one tile and brightness; one star in each cell of a 4 x 4 grid, none near a cell's rim."""
    rng = np.random.Generator(np.random.PCG64(7))
    cells = np.stack(np.meshgrid(np.arange(4), np.arange(4))).reshape(2, -1)
    places = (cells + 0.15 + 0.7 * rng.random(cells.shape)) / 4
    return np.concatenate([places, 0.75 + 0.25 * rng.random((1, 16))]).astype(np.float32)


def _waves(position: np.ndarray, softness: float) -> np.ndarray:
    """A square wave of period two cells and values +-1 with edges about a pixel wide."""
    phase = np.abs(np.mod(position / CELL + 0.5, 2) - 1) - 0.5  # triangle wave, zero at every cell border
    return np.clip(phase * (CELL / softness * 2), -1, 1)


def _background(scene: Scene, times: np.ndarray, size: tuple[int, int], style: str) -> np.ndarray:
    """(3, T or 1, H, W) in [0, 255]."""
    height, width = size
    unit = min(size)
    if scene.camera == "static":
        times = times[:1]
    centre_x, centre_y, zoom = (a[:, None].astype(np.float32) for a in camera_path(scene.camera, scene.seconds, times))
    x = (pixel_axis(width, unit) - 0.5) / zoom + centre_x  # (T, W) world
    y = (pixel_axis(height, unit) - 0.5) / zoom + centre_y
    level = 36.0 + 12.0 * (scene.tone % 4)
    if scene.background == "plain":
        light = np.full((1, height, width), level, np.float32)
    elif scene.background == "gradient":
        way_x, way_y = ((1, 0), (0, 1), (0.5, 0.5), (0.5, -0.5))[int(scene.shift[0] * 4)]
        ramp = way_x * (x - 0.5)[:, None, :] + way_y * (y - 0.5)[:, :, None]
        light = np.clip(level + 8 + ramp * (56 if scene.shift[1] < 0.5 else -56), 8, 120)
    elif scene.background == "checker":
        soft = 1 / (unit * zoom)
        waves = _waves(x, soft)[:, None, :] * _waves(y, soft)[:, :, None]
        light = level + 4 + (14 if scene.shift[0] < 0.5 else -14) * waves
    else:
        star_x, star_y, bright = _constellation()
        sharp = 1 / (math.sqrt(2) * max(DOT, 0.4 / unit) * zoom[:, :, None] ** -0.5)
        off_x = np.mod(x[:, :, None] - star_x - scene.shift[0] + 0.5, 1) - 0.5
        off_y = np.mod(y[:, :, None] - star_y - scene.shift[1] + 0.5, 1) - 0.5
        glow_x, glow_y = np.exp(-np.square(off_x * sharp)) * bright, np.exp(-np.square(off_y * sharp))
        light = 0.45 * level + 8 + 130 * np.matmul(glow_y, glow_x.transpose(0, 2, 1))
    tint = np.array(_TINTS[scene.tone // 4], np.float32) * (_NEON_DIM if style == "neon" else 1.0)
    return tint[:, None, None, None] * light


def object_distance(shape: str, place: Poses, i: int, box: tuple[slice, slice], size: tuple[int, int]) -> np.ndarray:
    """Signed distance of object `i` in pixels, (T, h, w), inside `box`."""
    unit = min(size)
    u = pixel_axis(size[1], unit)[box[1]][None, None, :] - place.x[i, :, None, None].astype(np.float32)
    v = pixel_axis(size[0], unit)[box[0]][None, :, None] - place.y[i, :, None, None].astype(np.float32)
    radius = place.radius[i].astype(np.float32)[:, None, None]
    if place.angle[i].any():
        cos = np.cos(place.angle[i]).astype(np.float32)[:, None, None]
        sin = np.sin(place.angle[i]).astype(np.float32)[:, None, None]
        u, v = u * cos + v * sin, v * cos - u * sin
    far = distance(shape, u / radius, v / radius) * (radius * unit)
    if not place.visible[i].all():
        far[~place.visible[i]] = 1e6
    return far


def object_box(shape: str, place: Poses, i: int, size: tuple[int, int], pad: float = 0.0) -> tuple[slice, slice]:
    """The rows and columns that object `i` can touch in any frame, `pad` world units around it included."""
    unit = min(size)
    reach = place.radius[i] * REACH[shape] + pad + 1.0 / unit
    sides = []
    for pixels, centre in ((size[0], place.y[i]), (size[1], place.x[i])):
        first = ((centre - reach).min() - 0.5) * unit + pixels / 2
        last = ((centre + reach).max() - 0.5) * unit + pixels / 2
        sides.append(slice(min(max(int(first), 0), pixels), min(max(int(last) + 1, 0), pixels)))
    return sides[0], sides[1]


def _coverage(far: np.ndarray, style: str, unit: int) -> np.ndarray:
    """How much of each pixel an object paints, from its signed distance in pixels."""
    if style == "flat":
        return np.clip(0.5 - far, 0, 1)
    if style == "pixel":
        return (far < 0).astype(np.float32)
    half = max(STROKE * unit, 1.0) / 2
    line = np.clip(half + 0.5 - np.abs(far + half), 0, 1)
    if style == "outline":
        return line
    away = np.maximum(np.abs(far + half) - half, 0)
    return np.maximum(line, 0.5 * np.exp(away * (-1 / (GLOW * unit))))


def frame_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _snap(scene: Scene, place: Poses) -> Poses:
    """Moves centres to block corners, or to block middles where a tip or a notch needs a column of its own, so that a
    sprite of the pixel style looks the same wherever it is."""
    middle = np.array([_MIDDLES.get(thing.shape, (0.0, 0.0)) for thing in scene.objects]).reshape(-1, 2)
    x, y = (
        (np.floor(a * BLOCKS - half[:, None] + 0.5) + half[:, None]) / BLOCKS
        for a, half in ((place.x, middle[:, 0]), (place.y, middle[:, 1]))
    )
    return place._replace(x=x, y=y)


def render(
    scene: Scene, frames: int = 17, size: int | tuple[int, int] = 64, fps: float = 8.0, style: str | None = None
) -> np.ndarray:
    """The scene's clip, uint8 (T, H, W, 3); `style` overrides the scene's own."""
    style = style or scene.style
    height, width = frame_size(size)
    times = np.arange(frames) / fps
    place = poses(scene, times)
    if style == "pixel":
        unit = min(height, width)
        rows, columns = (math.ceil(side * BLOCKS / unit / 2) * 2 for side in (height, width))
        canvas = _paint(scene, times, _snap(scene, place), (rows, columns), style)
        row_of = np.floor((pixel_axis(height, unit) - 0.5) * BLOCKS + rows / 2).astype(int)
        column_of = np.floor((pixel_axis(width, unit) - 0.5) * BLOCKS + columns / 2).astype(int)
        return canvas[:, row_of][:, :, column_of]
    return _paint(scene, times, place, (height, width), style)


def _paint(scene: Scene, times: np.ndarray, place: Poses, size: tuple[int, int], style: str) -> np.ndarray:
    unit = min(size)
    canvas = np.empty((3, len(times), *size), np.float32)
    canvas[:] = _background(scene, times, size, style)
    for i in sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].depth):
        thing = scene.objects[i]
        rows, columns = box = object_box(thing.shape, place, i, size, 4 * GLOW if style == "neon" else 0.0)
        cover = _coverage(object_distance(thing.shape, place, i, box, size), style, unit)
        for channel, value in enumerate(COLOURS[thing.colour]):
            part = canvas[channel, :, rows, columns]
            part += cover * (value - part)
    canvas += 0.5
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 3, 0))
