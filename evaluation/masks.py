"""Plain image processing on stacks of pictures `(T, H, W)`, in numpy alone."""

from __future__ import annotations

import numpy as np


def components(mask: np.ndarray) -> np.ndarray:
    """Labels (1 + a flat index, 0 outside) of every frame's 8-connected patches, by spreading and pointer jumping."""
    labels = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), 0)
    while True:
        reached = np.where(mask, spread(labels, np.maximum), 0)
        jumped = np.where(mask, labels.reshape(-1)[np.maximum(reached - 1, 0)], 0)
        jumped = np.maximum(jumped, reached)
        if np.array_equal(jumped, labels):
            return labels
        labels = jumped


def spread(values: np.ndarray, join: np.ufunc) -> np.ndarray:
    """`join` of every pixel with its eight neighbours."""
    rows = values.copy()
    join(rows[:, 1:], values[:, :-1], out=rows[:, 1:])
    join(rows[:, :-1], values[:, 1:], out=rows[:, :-1])
    both = rows.copy()
    join(both[:, :, 1:], rows[:, :, :-1], out=both[:, :, 1:])
    join(both[:, :, :-1], rows[:, :, 1:], out=both[:, :, :-1])
    return both


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask grown by so many pixels to every side, corners included."""
    for _ in range(pixels):
        mask = spread(mask, np.logical_or)
    return mask


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask without its outermost pixels; the frame's border does not eat into it."""
    for _ in range(pixels):
        mask = spread(mask, np.logical_and)
    return mask


def fill(mask: np.ndarray) -> np.ndarray:
    """The mask and every pixel that has some of it above, below, left and right."""
    filled = mask.copy()
    sides = [np.logical_or.accumulate(mask, axis) for axis in (1, 2)]
    sides += [np.logical_or.accumulate(np.flip(mask, axis), axis) for axis in (1, 2)]
    return filled | (sides[0] & sides[1] & np.flip(sides[2], 1) & np.flip(sides[3], 2))


def blur(light: np.ndarray, passes: int) -> np.ndarray:
    """(T, H, W) smoothed by [1 2 1] / 4 both ways, `passes` times."""
    for _ in range(passes):
        padded = np.pad(light, ((0, 0), (1, 1), (0, 0)), mode="edge")
        light = 0.5 * light + 0.25 * (padded[:, 2:] + padded[:, :-2])
        padded = np.pad(light, ((0, 0), (0, 0), (1, 1)), mode="edge")
        light = 0.5 * light + 0.25 * (padded[:, :, 2:] + padded[:, :, :-2])
    return light


def halve(values: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels."""
    values = values[:, : values.shape[1] // 2 * 2, : values.shape[2] // 2 * 2]
    return (values[:, ::2, ::2] + values[:, 1::2, ::2] + values[:, ::2, 1::2] + values[:, 1::2, 1::2]) / 4
