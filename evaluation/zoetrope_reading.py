"""Reads a Zoetrope clip of about two seconds (17 frames), or one frame, back into objects with plain image processing.

`read` knows the palette and the vocabulary of the world, and looks at nothing but pixels. Each colour's share of every
pixel comes from hue and chroma; an object is a connected patch of one colour; its silhouette (holes filled) gives shape
and size, the silhouette's path gives the motion, the pixels around it the camera and the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelm.data.zoetrope.render import distance
from reelm.data.zoetrope.scene import COLOURS, PAN, SHAPES, SIZES, TEXTURED, ZOOM
from reelm.evaluation.masks import blur, components, dilate, erode, fill, halve

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
    busy = dilate(busy, 8 if style == "neon" else 3)
    light = frames.mean(-1)
    camera = _camera(light, busy) if len(frames) > 1 else None
    background = _background(light, busy, camera or "static", style)
    if camera is not None and background not in TEXTURED:  # nothing there could show a camera's motion
        camera = "static"
    return Reading(
        objects=tuple(_object(t, s, camera, frames.shape) for t, s in zip(tracks, silhouettes, strict=True)),
        background=background,
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
    """Every patch of one colour that lasts, in the palette's order."""
    hue, chroma, top = _hue(frames)
    hues = np.append(_PALETTE_HUE[:-1], 6.0)  # the palette goes round the circle from red at 0 back to red
    nearest = np.searchsorted((hues[1:] + hues[:-1]) / 2, hue) % (len(_NAMES) - 1)
    vivid = chroma > 0.25 * top
    ground = min(np.median(top), 200)
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
    labels = components(dilate(mask, 1))
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


def _silhouette(track: _Track, style: str) -> np.ndarray:
    """(T, H, W): what the object covers. A line's light spreads in neon, so that only its bright part counts there."""
    if not track.mask.any():
        return track.mask
    peak = np.quantile(track.share[track.mask], 0.8)
    near = dilate(track.mask, 1)
    return fill(near & (track.share > peak * (0.7 if style == "neon" else 0.5)))


# -------------------------------------------------------------------------------- style


def _style(frames: np.ndarray, tracks: Sequence[_Track]) -> str:
    """Hollow with light around is neon, hollow is outline; edges on every second pixel only are pixel art."""
    hollow, glow, weights = [], [], []
    inner, outer = np.zeros(2), np.zeros(2)  # squared steps inside and between pairs of pixels, down and right
    taken = np.zeros(frames.shape[:3], bool)
    for track in tracks:
        taken[:, track.box[0], track.box[1]] |= track.mask
    free = ~dilate(taken, 1)
    for track in tracks:
        filled, empty = fill(track.mask), free[:, track.box[0], track.box[1]]
        core = next(
            (core for core in (erode(filled, 3), erode(filled, 2)) if core.sum() >= len(frames)), erode(filled, 1)
        )
        around = dilate(filled, 3) & ~dilate(filled, 2) & empty
        far = dilate(filled, 8) & ~dilate(filled, 6) & empty
        if not (core.any() and around.any() and far.any()):
            continue
        peak = np.quantile(track.share[track.mask], 0.8)
        # how much of the object's colour is in each pixel, greys not counting: linear, so that noise averages out
        colour = np.array(COLOURS[track.colour], np.float32)
        axis = colour if track.colour == "white" else colour - colour.mean()
        light = frames[:, track.box[0], track.box[1]] @ (axis / (axis @ colour))
        hollow.append(track.share[core].mean() / peak)
        glow.append((light[around].mean() - light[far].mean()) / peak)
        weights.append(core.sum())
        near = np.where(dilate(filled, 2), track.share, 0)
        for axis in (1, 2):
            steps = np.square(np.diff(near, axis=axis)).sum((0, 3 - axis))
            odd = track.box[axis - 1].start % 2
            inner[axis - 1] += steps[odd::2].sum()
            outer[axis - 1] += steps[1 - odd :: 2].sum()
    if not weights:
        return "flat"
    if np.average(hollow, weights=weights) < 0.62:
        return "neon" if np.average(glow, weights=weights) > 0.05 else "outline"
    # a single flat shape can happen to end between pairs of pixels; over many frames that hardly ever happens
    most = 0.32 if len(frames) > 1 else 0.26
    return "pixel" if (inner < most * (inner + outer)).all() else "flat"


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
    fine = np.stack(np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-2, 2, 401)))
    for shape in SHAPES:
        centre_x, centre_y = fine[:, distance(shape, *fine) < 0].mean(1)
        scale = math.sqrt(_template_area(shape))
        for angle in np.radians(np.arange(0, 360, 10)) if turned and shape != "circle" else (0.0,):
            cos, sin = np.cos(angle), np.sin(angle)
            u, v = grid[0] * cos + grid[1] * sin, grid[1] * cos - grid[0] * sin
            far = distance(shape, u * scale + centre_x, v * scale + centre_y)
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


def _camera(light: np.ndarray, busy: np.ndarray) -> str:
    """One pan and zoom a frame, by least squares over all changes of the background (Lucas and Kanade 1981)."""
    smooth = blur(halve(np.where(busy, np.median(light), light)), 2)
    free = ~dilate(halve(busy.astype(np.float32)) > 0, 1)
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
    smooth = blur(rest[None], 1)[0][known]
    spread = max(smooth.std(), 1e-6)
    if (smooth**3).mean() / spread**3 > 1.2 and np.quantile(smooth, 0.99) > 8:
        return "stars"
    return "gradient" if math.hypot(plane[1], plane[2]) > (8 if style == "neon" else 14) else "plain"
