"""Everything that is exactly known about a Zoetrope clip, as arrays: masks, boxes, tracks, depth, flow, camera, sounds.

Truth is geometry: it is the same for every style of a scene. (The pixel style moves objects by up to half a block.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reelm.data.zoetrope.render import frame_size, object_box, object_distance, pixel_axis
from reelm.data.zoetrope.scene import Poses, Scene, bounce_times, camera_path, poses

FIELDS = ("masks", "boxes", "tracks", "depth", "flow", "camera", "sounds")


def truth(
    scene: Scene,
    frames: int = 17,
    size: int | tuple[int, int] = 64,
    fps: float = 8.0,
    fields: Sequence[str] = FIELDS,
) -> dict[str, np.ndarray]:
    """The named fields, for N objects, T frames of H x W pixels:

    masks (N, T, H, W) bool: the pixels where an object is the nearest thing (hollow styles: its whole silhouette).
    boxes (N, T, 4) float32: x0, y0, x1, y1 in pixels around the mask, upper bounds exclusive; zeros when unseen.
    tracks (N, T, 3) float32: the centre's x and y in pixels, and 1 where the object is there, else 0.
    depth (T, H, W) float32 in [0, 1]: 1 is nearest, the background is 0.
    flow (T, H, W, 2) float32: how far (x, y) what a pixel shows moves until the next frame, in pixels; the last frame
        repeats the one before it, a single frame has none (zeros).
    camera (T, 3, 4) float32: an affine camera; `camera @ (X, Y, Z, 1)` of a world point is its place on the screen
        (both in world units, [0, 1] across the central square) and its depth.
    sounds (E, 3) float32: one row (second, object, kind) an event of the first T / fps seconds, sorted by time; kind 0
        is a bounce, 1 an appearance (a voice begins), 2 a vanishing (a voice ends).
    """
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise ValueError(f"unknown truth {unknown[0]!r}: choose from {', '.join(FIELDS)}")
    height, width = frame_size(size)
    unit = min(height, width)
    times = np.arange(frames) / fps
    place = poses(scene, times)
    order = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].depth)
    boxes = {i: object_box(scene.objects[i].shape, place, i, (height, width)) for i in order}
    inside = {}
    if not {"masks", "boxes", "depth", "flow"}.isdisjoint(fields):
        inside = {i: object_distance(scene.objects[i].shape, place, i, boxes[i], (height, width)) < 0 for i in order}

    known: dict[str, np.ndarray] = {}
    if "masks" in fields or "boxes" in fields:
        masks = np.zeros((len(order), frames, height, width), bool)
        for nearer, i in enumerate(order):
            masks[order[:nearer], :, boxes[i][0], boxes[i][1]] &= ~inside[i]
            masks[i, :, boxes[i][0], boxes[i][1]] = inside[i]
        if "masks" in fields:
            known["masks"] = masks
        if "boxes" in fields:
            known["boxes"] = np.concatenate([_extent(masks.any(2)), _extent(masks.any(3))], -1)[..., [0, 2, 1, 3]]
    if "tracks" in fields:
        x, y = (place.x - 0.5) * unit + width / 2, (place.y - 0.5) * unit + height / 2
        known["tracks"] = np.stack([x, y, place.visible], -1).astype(np.float32)
    if "depth" in fields:
        known["depth"] = np.zeros((frames, height, width), np.float32)
        for i in order:
            known["depth"][:, boxes[i][0], boxes[i][1]][inside[i]] = scene.objects[i].depth
    if "flow" in fields:
        known["flow"] = _flow(scene, place, times, (height, width), boxes, inside)
    if "camera" in fields:
        known["camera"] = _camera(scene, times)
    if "sounds" in fields:
        events = sound_events(scene, frames / fps)
        known["sounds"] = np.array(events, np.float32).reshape(-1, 3)
    return known


def sound_events(scene: Scene, seconds: float) -> list[tuple[float, int, int]]:
    """(second, object, kind) of every sudden sound: kind 0 is a bounce, 1 a voice that begins, 2 a voice that ends."""
    events = [(when, i, 0) for i, thing in enumerate(scene.objects) for when in bounce_times(thing, seconds)]
    for i, thing in enumerate(scene.objects):
        if thing.motion in ("appear", "vanish") and thing.phase < seconds:
            events.append((thing.phase, i, 1 if thing.motion == "appear" else 2))
    return sorted(events)


def _extent(lines: np.ndarray) -> np.ndarray:
    """First and last-plus-one index of the True entries along the last axis, (..., 2); zeros where there are none."""
    first, last = lines.argmax(-1), lines.shape[-1] - lines[..., ::-1].argmax(-1)
    return np.where(lines.any(-1)[..., None], np.stack([first, last], -1), 0).astype(np.float32)


def _camera(scene: Scene, times: np.ndarray) -> np.ndarray:
    centre_x, centre_y, zoom = camera_path(scene.camera, scene.seconds, times)
    matrices = np.zeros((len(times), 3, 4), np.float32)
    matrices[:, 0, 0] = matrices[:, 1, 1] = zoom
    matrices[:, 0, 3], matrices[:, 1, 3] = 0.5 - zoom * centre_x, 0.5 - zoom * centre_y
    matrices[:, 2, 2] = 1
    return matrices


def _flow(
    scene: Scene,
    place: Poses,
    times: np.ndarray,
    size: tuple[int, int],
    boxes: dict[int, tuple[slice, slice]],
    inside: dict[int, np.ndarray],
) -> np.ndarray:
    """Objects move rigidly up to their scale, and so does the background: one affine map each from frame to frame."""
    frames, unit = len(times), min(size)
    if frames == 1:
        return np.zeros((1, *size, 2), np.float32)
    centre_x, centre_y, zoom = camera_path(scene.camera, scene.seconds, times)
    x, y = pixel_axis(size[1], unit), pixel_axis(size[0], unit)
    flow = np.empty((2, frames - 1, *size), np.float32)
    scale = (zoom[1:] / zoom[:-1])[:, None]
    for axis, along, centre in ((0, x, centre_x), (1, y, centre_y)):
        shift = (centre[:-1] - centre[1:])[:, None] * zoom[1:, None]
        line = (((along - 0.5) * (scale - 1) + shift) * unit).astype(np.float32)
        flow[axis] = line[:, None, :] if axis == 0 else line[:, :, None]
    for i in sorted(inside, key=lambda i: scene.objects[i].depth):
        rows, columns = boxes[i]
        u = x[columns][None, None, :] - place.x[i, :-1, None, None]
        v = y[rows][None, :, None] - place.y[i, :-1, None, None]
        turn = np.diff(place.angle[i])
        scale = place.radius[i, 1:] / place.radius[i, :-1]
        cos, sin = (scale * np.cos(turn) - 1)[:, None, None], (scale * np.sin(turn))[:, None, None]
        moved_x = u * cos - v * sin + np.diff(place.x[i])[:, None, None]
        moved_y = u * sin + v * cos + np.diff(place.y[i])[:, None, None]
        for axis, moved in ((0, moved_x), (1, moved_y)):
            part = flow[axis, :, rows, columns]
            np.copyto(part, (moved * unit).astype(np.float32), where=inside[i][:-1])
    flow = np.concatenate([flow, flow[:, -1:]], 1)
    return np.ascontiguousarray(flow.transpose(1, 2, 3, 0))
