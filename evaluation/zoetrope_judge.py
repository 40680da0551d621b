"""Reads a Zoetrope clip back into objects with plain image processing, and scores what a prompt asked for.

`read` knows the palette and the vocabulary of the world, and looks at nothing but pixels. Each colour's share of every
pixel comes from hue and chroma; an object is a connected patch of one colour; its silhouette (holes filled) gives shape
and size, the silhouette's path gives the motion, the pixels around it the camera and the background. A model's score
means something beside `reference`: what the judge says of true clips and of true clips with other clips' captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelm.data.zoetrope.captions import Attributes
from reelm.data.zoetrope.render import distance, render
from reelm.data.zoetrope.scene import COLOURS, PAN, SHAPES, SIZES, ZOOM, Scene, sample_scene

ATTRIBUTES = ("count", "colour", "shape", "size", "motion", "camera", "background", "style")
_SIDE = 64  # every clip is read at this many pixels along its shorter side
_CANVAS = 20  # pixels along a side of the grid on which silhouettes are compared
_ORDERS = np.arange(1, 9)  # angular frequencies of the silhouettes' outlines
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NAMES = tuple(COLOURS)


@dataclass(frozen=True, slots=True)
class Seen:
    """One object as the judge sees it; `motion` is None in a single frame."""

    shape: str
    colour: str
    size: str
    motion: str | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What the judge sees in a clip; `camera` is None in a single frame."""

    objects: tuple[Seen, ...]
    background: str
    camera: str | None
    style: str

    @property
    def count(self) -> int:
        return len(self.objects)


class _Track(NamedTuple):
    """One object over the clip: its colour, its share of each pixel and where it is, (T, h, w) inside `box`."""

    colour: str
    share: np.ndarray
    mask: np.ndarray
    box: tuple[slice, slice]


def read(video: np.ndarray | Tensor) -> Reading:
    """Objects, background, camera and style of one clip: uint8 (T, H, W, 3), or a tensor (3, T, H, W) in [-1, 1]."""
    frames = _frames(video)
    tracks = _tracks(frames)
    style = _style(frames, tracks)
    silhouettes = [_silhouette(track, style) for track in tracks]
    busy = np.zeros(frames.shape[:3], bool)
    for track, silhouette in zip(tracks, silhouettes, strict=True):
        busy[:, track.box[0], track.box[1]] |= silhouette
    busy = _dilate(busy, 8 if style == "neon" else 3)
    light = frames.mean(-1)
    camera = _camera(light, busy) if len(frames) > 1 else None
    return Reading(
        objects=tuple(_object(t, s, camera, frames.shape) for t, s in zip(tracks, silhouettes, strict=True)),
        background=_background(light, busy, camera or "static", style),
        camera=camera,
        style=style,
    )


def _frames(video: np.ndarray | Tensor) -> np.ndarray:
    """float32 (T, H, W, 3) in [0, 255] whose shorter side is `_SIDE`."""
    if isinstance(video, Tensor):
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(f"the judge reads one clip (3, T, H, W); got {tuple(video.shape)}: take clip.video[i]")
        pixels = (video.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
    else:
        if video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(f"the judge reads one clip (T, H, W, 3); got {tuple(video.shape)}")
        pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(3, 0, 1, 2).float()
    height, width = pixels.shape[2:]
    if min(height, width) != _SIDE:
        size = [round(side * _SIDE / min(height, width)) for side in (height, width)]
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()


# -------------------------------------------------------------------------------- objects


def _hue(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in sixths of a turn, chroma and the largest channel of (..., 3) colours."""
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    top = np.maximum(np.maximum(red, green), blue)
    chroma = top - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(chroma, 1e-3)
    hue = np.where(
        top == red, (green - blue) / safe, np.where(top == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    return np.mod(hue, 6), chroma, top


_PALETTE_HUE, _PALETTE_CHROMA, _ = _hue(_PALETTE)


def _tracks(frames: np.ndarray) -> list[_Track]:
    """Every patch of one colour that lasts, nearest colours first in the palette's order."""
    hue, chroma, top = _hue(frames)
    apart = np.abs(hue[..., None] - _PALETTE_HUE[:-1])
    nearest = np.minimum(apart, 6 - apart).argmin(-1)
    vivid = chroma > 0.25 * top
    ground = np.median(top)
    tracks = []
    for number, name in enumerate(_NAMES):
        if name == "white":
            share = np.where(vivid, 0, (top - ground) / (245 - ground))
            floor = 0.55  # the stars of a background are nearly this bright
        else:
            share = np.where(vivid & (nearest == number), chroma / _PALETTE_CHROMA[number], 0)
            floor = 0.35
        tracks += _patches(name, np.clip(share, 0, 1).astype(np.float32), floor)
    return tracks


def _patches(name: str, share: np.ndarray, floor: float) -> list[_Track]:
    """The largest patch of a colour in every frame, and the second where there is nearly always one of like size."""
    mask = share > floor
    if mask.sum() < 10:
        return []
    box = _around(mask.any(0))
    share, mask = share[:, box[0], box[1]], mask[:, box[0], box[1]]
    labels = _components(_dilate(mask, 1))
    pixels = mask.shape[1] * mask.shape[2]
    patches: list[list[tuple[int, int]]] = [[] for _ in mask]
    for label, area in zip(*np.unique(labels[mask], return_counts=True), strict=True):
        if area >= 10:
            patches[(label - 1) // pixels].append((int(area), int(label)))
    tracks = []
    for rank in range(2):
        chosen = np.zeros_like(mask)
        seen = 0
        for frame, found in enumerate(patches):
            found.sort(reverse=True)
            if len(found) > rank and (rank == 0 or found[rank][0] >= max(14, 0.35 * found[0][0])):
                chosen[frame] = mask[frame] & (labels[frame] == found[rank][1])
                seen += 1
        if seen >= max(1, (0.2, 0.5)[rank] * len(mask)):
            tracks.append(_Track(name, share, chosen, box))
    return tracks


def _around(mask: np.ndarray, margin: int = 9) -> tuple[slice, slice]:
    """Rows and columns around the True pixels of a picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(max(rows[0] - margin, 0), rows[-1] + margin + 1), slice(
        max(columns[0] - margin, 0), columns[-1] + margin + 1
    )


def _components(mask: np.ndarray) -> np.ndarray:
    """Labels (1 + a flat index, 0 outside) of every frame's 8-connected patches, by spreading and pointer jumping."""
    labels = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, _spread(labels, np.maximum), 0)
        jumped = np.where(mask, labels.reshape(-1)[np.maximum(spread - 1, 0)], 0)
        jumped = np.maximum(jumped, spread)
        if np.array_equal(jumped, labels):
            return labels
        labels = jumped


def _spread(values: np.ndarray, join: np.ufunc) -> np.ndarray:
    """`join` of every pixel with its eight neighbours."""
    rows = values.copy()
    join(rows[:, 1:], values[:, :-1], out=rows[:, 1:])
    join(rows[:, :-1], values[:, 1:], out=rows[:, :-1])
    both = rows.copy()
    join(both[:, :, 1:], rows[:, :, :-1], out=both[:, :, 1:])
    join(both[:, :, :-1], rows[:, :, 1:], out=both[:, :, :-1])
    return both


def _dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    for _ in range(pixels):
        mask = _spread(mask, np.logical_or)
    return mask


def _erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    for _ in range(pixels):
        mask = _spread(mask, np.logical_and)
    return mask


def _fill(mask: np.ndarray) -> np.ndarray:
    """The mask and every pixel that has some of it above, below, left and right."""
    filled = mask.copy()
    sides = [np.logical_or.accumulate(mask, axis) for axis in (1, 2)]
    sides += [np.logical_or.accumulate(np.flip(mask, axis), axis) for axis in (1, 2)]
    return filled | (sides[0] & sides[1] & np.flip(sides[2], 1) & np.flip(sides[3], 2))


def _silhouette(track: _Track, style: str) -> np.ndarray:
    """(T, H, W): what the object covers. A line's light spreads in neon, so that only its bright part counts there."""
    if not track.mask.any():
        return track.mask
    peak = np.quantile(track.share[track.mask], 0.8)
    near = _dilate(track.mask, 1)
    return _fill(near & (track.share > peak * (0.7 if style == "neon" else 0.5)))


# -------------------------------------------------------------------------------- style


def _style(frames: np.ndarray, tracks: Sequence[_Track]) -> str:
    """Hollow with light around is neon, hollow is outline; edges on every second pixel only are pixel art."""
    hollow, glow, weights = [], [], []
    inner, outer = np.zeros(2), np.zeros(2)  # squared steps inside and between pairs of pixels, down and right
    for track in tracks:
        filled = _fill(track.mask)
        core = _erode(filled, 3)
        if core.sum() < len(frames):
            core = _erode(filled, 2)
        around = _dilate(filled, 3) & ~_dilate(filled, 2)
        if not (core.any() and around.any()):
            continue
        far = _dilate(filled, 8) & ~_dilate(filled, 6)
        peak = np.quantile(track.share[track.mask], 0.8)
        hollow.append(track.share[core].mean() / peak)
        glow.append((np.median(track.share[around]) - np.median(track.share[far])) / peak)
        weights.append(core.sum())
        near = np.where(_dilate(filled, 2), track.share, 0)
        for axis in (1, 2):
            steps = np.square(np.diff(near, axis=axis)).sum((0, 3 - axis))
            odd = track.box[axis - 1].start % 2
            inner[axis - 1] += steps[odd::2].sum()
            outer[axis - 1] += steps[1 - odd :: 2].sum()
    if not weights:
        return "flat"
    light = np.average(glow, weights=weights)
    if np.average(hollow, weights=weights) < 0.62:
        return "neon" if light > 0.06 else "outline"
    return "pixel" if (inner < 0.32 * (inner + outer)).all() else "flat"


# -------------------------------------------------------------------------------- shape, size, motion


def _object(track: _Track, silhouette: np.ndarray, camera: str | None, size: tuple[int, ...]) -> Seen:
    areas = silhouette.sum((1, 2)).astype(np.float64)
    seen = areas >= min(6, areas.max())
    frames, height, width = size[:3]
    rows, columns = np.arange(silhouette.shape[1]), np.arange(silhouette.shape[2])
    x = (silhouette.sum(1) @ columns) / np.maximum(areas, 1)
    y = (silhouette.sum(2) @ rows) / np.maximum(areas, 1)
    zoom = np.ones(frames)
    waves = _waves(silhouette, x, y)
    turn = _turn(waves, seen)
    world_x, world_y = x + track.box[1].start, y + track.box[0].start
    if camera is not None and camera != "static":
        shift_x, shift_y, zoom = _nominal_camera(camera, frames)
        world_x = (world_x - width / 2) / zoom + shift_x
        world_y = (world_y - height / 2) / zoom + shift_y
    areas = areas / zoom**2
    full = seen & (areas >= 0.6 * np.quantile(areas[seen], 0.9))
    spins = abs(turn) > math.radians(5.5)
    shape = _shape(silhouette, x, y, full, spins)
    radius = math.sqrt(np.quantile(areas[seen], 0.75 if full.all() else 0.95) / _template_area(shape)) / _SIDE
    named = min(SIZES, key=lambda name: abs(math.log(radius / SIZES[name])))
    motion = None
    if camera is not None:
        motion = _motion(world_x[seen] / _SIDE, world_y[seen] / _SIDE, areas, seen, spins and shape != "circle")
    return Seen(shape, track.colour, named, motion)


def _motion(x: np.ndarray, y: np.ndarray, areas: np.ndarray, seen: np.ndarray, spins: bool) -> str:
    """From the path (x, y) over the frames in which the object is seen, in frame heights."""
    absent = max(2, round(0.2 * len(seen)))
    if not seen[:absent].any():
        return "appear"
    if not seen[-absent:].any():
        return "vanish"
    steps = np.diff(x - x.mean() + 1j * (y - y.mean()))
    path = x - (x.max() + x.min()) / 2 + 1j * (y - (y.max() + y.min()) / 2)
    wide, high = np.ptp(x), np.ptp(y)
    go = x[-1] - x[0] + 1j * (y[-1] - y[0])
    travelled = np.abs(steps).sum()
    if min(wide, high) > 0.13 and abs(go) < 0.6 * travelled:
        turning = np.angle(path[1:] * np.conj(path[:-1])).sum()
        return "orbit clockwise" if turning > 0 else "orbit counter-clockwise"
    if max(wide, high) > 0.13:
        if abs(go) < 0.7 * travelled and high > wide:
            return "bounce"
        along = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
        return along[round(np.angle(go) / (math.pi / 4)) % 8]
    known = areas[seen]
    edge = max(1, len(known) // 5)
    change = known[-edge:].mean() / known[:edge].mean()
    if change > 1.9 or change < 1 / 1.9:
        return "grow" if change > 1 else "shrink"
    return "spin" if spins else "still"


def _waves(silhouette: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(T, orders): the outline's angular frequencies about the centre, independent of size."""
    rows = np.arange(silhouette.shape[1])[None, :, None] - y[:, None, None]
    columns = np.arange(silhouette.shape[2])[None, None, :] - x[:, None, None]
    inside = np.nonzero(silhouette)
    z = (columns + 1j * rows * np.ones_like(columns))[inside]
    squared = np.abs(z) ** 2
    unit = z / np.sqrt(np.maximum(squared, 1e-9))
    frames = len(silhouette)
    total = np.maximum(np.bincount(inside[0], squared, frames), 1e-9)
    waves, power = np.empty((frames, len(_ORDERS)), complex), squared.astype(complex)
    for i in range(len(_ORDERS)):
        power = power * unit
        waves[:, i] = (
            np.bincount(inside[0], power.real, frames) + 1j * np.bincount(inside[0], power.imag, frames)
        ) / total
    return waves


def _turn(waves: np.ndarray, seen: np.ndarray) -> float:
    """The rotation from frame to frame, in radians, that best explains the outlines."""
    pairs = seen[1:] & seen[:-1]
    product = (waves[1:] * waves[:-1].conj())[pairs].sum(0)
    angles = np.radians(np.arange(-25, 25.5, 0.5))
    return float(angles[(product * np.exp(-1j * _ORDERS * angles[:, None])).real.sum(1).argmax()])


@lru_cache(maxsize=8)
def _template_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    line = np.linspace(-1.6, 1.6, 641)
    return float((distance(shape, *np.meshgrid(line, line)) < 0).mean() * 3.2**2)


@lru_cache(maxsize=2)
def _templates(turned: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and silhouettes (templates, pixels) on the common grid, upright or in many orientations."""
    grid = _grid()
    names, images = [], []
    for shape in SHAPES:
        for angle in np.radians(np.arange(0, 360, 10)) if turned and shape != "circle" else (0.0,):
            fine = np.linspace(-2, 2, 401)
            u, v = np.meshgrid(fine, fine)
            inside = distance(shape, u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)) < 0
            centre_x, centre_y = u[inside].mean(), v[inside].mean()
            scale = math.sqrt(_template_area(shape))
            u, v = grid[0] * scale + centre_x, grid[1] * scale + centre_y
            far = distance(shape, u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle))
            images.append(np.clip(0.5 - far / scale * 9, 0, 1).ravel())
            names.append(shape)
    return tuple(names), np.array(images)


def _grid() -> np.ndarray:
    """(2, n, n) x and y, in units of the square root of the area, around the centroid."""
    line = (np.arange(_CANVAS) + 0.5) / _CANVAS * 1.9 - 0.95
    return np.stack(np.meshgrid(line, line))


def _shape(silhouette: np.ndarray, x: np.ndarray, y: np.ndarray, full: np.ndarray, spins: bool) -> str:
    """The template nearest to the silhouettes of the frames in `full`, brought to one size and centre."""
    used = np.flatnonzero(full)
    grid = _grid()
    soft = np.pad(silhouette[used].astype(np.float32), ((0, 0), (1, 2), (1, 2)))
    scale = np.sqrt(silhouette[used].sum((1, 2)))[:, None, None]
    at_x = np.clip(grid[0] * scale + x[used, None, None] + 1, 0, soft.shape[2] - 2)
    at_y = np.clip(grid[1] * scale + y[used, None, None] + 1, 0, soft.shape[1] - 2)
    left, above = at_x.astype(int), at_y.astype(int)
    right_share, below_share = at_x - left, at_y - above
    frame = np.arange(len(used))[:, None, None]
    upper = soft[frame, above, left] * (1 - right_share) + soft[frame, above, left + 1] * right_share
    lower = soft[frame, above + 1, left] * (1 - right_share) + soft[frame, above + 1, left + 1] * right_share
    images = (upper * (1 - below_share) + lower * below_share).reshape(len(used), -1)
    names, templates = _templates(spins)
    if not spins:
        images = images.mean(0, keepdims=True)
    errors = np.square(images).sum(1)[:, None] + np.square(templates).sum(1) - 2 * images @ templates.T
    totals = {}
    for shape in SHAPES:
        totals[shape] = errors[:, [i for i, name in enumerate(names) if name == shape]].min(1).sum()
    return min(totals, key=totals.__getitem__)


# -------------------------------------------------------------------------------- camera, background


def _nominal_camera(camera: str, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far the world's camera has moved (x, y in pixels) and its zoom, in each frame."""
    share = np.arange(frames) / frames
    kind, _, way = camera.partition(" ")
    x = {"left": -1, "right": 1}.get(way, 0) * share * PAN * _SIDE * (kind == "pan")
    y = {"up": -1, "down": 1}.get(way, 0) * share * PAN * _SIDE * (kind == "pan")
    return x, y, np.power({"in": ZOOM, "out": 1 / ZOOM}.get(way, 1.0), share)


def _blur(light: np.ndarray, passes: int) -> np.ndarray:
    """(T, H, W) smoothed by [1 2 1] / 4 both ways, `passes` times."""
    for _ in range(passes):
        padded = np.pad(light, ((0, 0), (1, 1), (0, 0)), mode="edge")
        light = 0.5 * light + 0.25 * (padded[:, 2:] + padded[:, :-2])
        padded = np.pad(light, ((0, 0), (0, 0), (1, 1)), mode="edge")
        light = 0.5 * light + 0.25 * (padded[:, :, 2:] + padded[:, :, :-2])
    return light


def _halve(values: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels."""
    values = values[:, : values.shape[1] // 2 * 2, : values.shape[2] // 2 * 2]
    return (values[:, ::2, ::2] + values[:, 1::2, ::2] + values[:, ::2, 1::2] + values[:, 1::2, 1::2]) / 4


def _camera(light: np.ndarray, busy: np.ndarray) -> str:
    """One pan and zoom a frame, by least squares over all changes of the background (Lucas and Kanade 1981)."""
    smooth = _blur(_halve(np.where(busy, np.median(light), light)), 2)
    free = ~_dilate(_halve(busy.astype(np.float32)) > 0, 1)
    change = smooth[1:] - smooth[:-1]
    middle = (smooth[1:] + smooth[:-1]) / 2
    slope_y, slope_x = np.gradient(middle, axis=(1, 2))
    free = free[1:] & free[:-1]
    free[:, :2] = free[:, -2:] = free[:, :, :2] = free[:, :, -2:] = False
    height, width = smooth.shape[1:]
    y, x = np.mgrid[:height, :width] - np.array([height - 1, width - 1])[:, None, None] / 2
    growth = slope_x * x + slope_y * y
    columns = np.stack([slope_x[free], slope_y[free], growth[free] / 10])
    ridge = np.eye(3) * 0.2 * max(free.sum(), 1)  # without texture the answer is "static"
    pan_x, pan_y, grow = np.linalg.solve(columns @ columns.T + ridge, columns @ change[free])
    speed = PAN * _SIDE / 2 / len(light)
    zoom = 10 * math.log(ZOOM) / len(light)
    votes = {"left": -pan_x / speed, "right": pan_x / speed, "up": -pan_y / speed, "down": pan_y / speed}
    votes |= {"in": -grow / zoom, "out": grow / zoom}
    way = max(votes, key=votes.__getitem__)
    if votes[way] < 0.45:
        return "static"
    return f"zoom {way}" if way in ("in", "out") else f"pan {way}"


def _background(light: np.ndarray, busy: np.ndarray, camera: str, style: str) -> str:
    frames = len(light) if camera == "static" else min(2, len(light))
    known = (~busy[:frames]).sum(0)
    picture = np.where(busy[:frames], 0, light[:frames]).sum(0) / np.maximum(known, 1)
    known = known > 0
    if known.sum() < 200:
        return "plain"
    y, x = (np.mgrid[: picture.shape[0], : picture.shape[1]] - _SIDE / 2) / _SIDE
    terms = np.stack([np.ones(known.sum()), x[known], y[known]])
    plane = np.linalg.lstsq(terms.T, picture[known], rcond=None)[0]
    rest = np.where(known, picture - plane[0] - plane[1] * x - plane[2] * y, 0)
    cell = _SIDE // 8

    def alike(down: int, right: int) -> float:
        """Correlation of the picture with itself `down` and `right` pixels on."""
        a, b = rest[: rest.shape[0] - down, : rest.shape[1] - right], rest[down:, right:]
        both = known[: rest.shape[0] - down, : rest.shape[1] - right] & known[down:, right:]
        return float((a * b)[both].mean() / max(np.square(rest[known]).mean(), 1e-6)) if both.any() else 0.0

    if (
        np.square(rest[known]).mean() > 8
        and alike(cell, cell) > 0.25
        and alike(cell, 0) < -0.15
        and alike(0, cell) < -0.15
    ):
        return "checker"
    smooth = _blur(rest[None], 1)[0][known]
    spread = max(smooth.std(), 1e-6)
    if (smooth**3).mean() / spread**3 > 1.2 and np.quantile(smooth, 0.99) > 8:
        return "stars"
    return "gradient" if math.hypot(plane[1], plane[2]) > (8 if style == "neon" else 14) else "plain"


# -------------------------------------------------------------------------------- scores


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
    """The seen object that stands for each asked one, or None."""
    keys = []
    for want in asked.objects:
        name = next((name for name in ("colour", "shape", "motion", "size") if getattr(want, name) is not None), None)
        keys.append((name, name and getattr(want, name)))
    candidates = [*seen, *[None] * len(keys)] if len(seen) < len(keys) else list(seen)
    candidates = candidates[: max(len(keys), min(len(candidates), 6))]

    def agreement(order: tuple[Seen | None, ...]) -> int:
        return sum(
            s is not None and name is not None and getattr(s, name) == value for s, (name, value) in zip(order, keys)
        )

    return list(max(permutations(candidates, len(keys)), key=agreement))


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
    scenes = [sample_scene(seed, split, i, still=frames == 1, seconds=max(frames, 17) / 8) for i in range(count)]
    readings = [read(render(scene, frames)) for scene in scenes]
    others = scenes[1:] + scenes[:1]
    return {
        "true": _shares(map(score, readings, scenes)),
        "shuffled": _shares(map(score, readings, others)),
    }
