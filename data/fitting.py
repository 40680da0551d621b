"""From a decoded frame to upright RGB of the wanted size: display matrix, alpha, pixel aspect, scaling, cut or bars."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
from av import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

Fit = Literal["crop", "pad", "none"]
Size = int | tuple[int, int] | None


def wanted(size: Size, fit: str) -> tuple[int, int] | int | None:
    """`size` checked: (height, width), the short side (fit="none") or None; ValueError otherwise."""
    if fit not in ("crop", "pad", "none"):
        raise ValueError(f"fit={fit!r} is unknown: use 'crop' (cut), 'pad' (black bars) or 'none' (keep shape)")
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(not isinstance(side, int) or not 1 <= side <= 16384 for side in sides):
        raise ValueError(f"size={size!r} is not a size: give one side or (height, width) in pixels, 1 to 16384")
    if fit == "none" and not isinstance(size, int):
        raise ValueError(f"fit='none' takes one number, the short side; got size={size!r}")
    return size if fit == "none" else sides


class Orientation:
    """How stored pixels are shown: a transposition, then flips. Read from a frame's display matrix.

    The matrix maps stored (x, y) to shown (a x + c y, b x + d y) in 16.16 fixed point (ISO/IEC 14496-12, 8.3.2).
    """

    def __init__(self, frame: VideoFrame) -> None:
        try:
            data = frame.side_data.get("DISPLAYMATRIX")
            a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist() if data is not None else (1, 0, 0, 0, 1)
        except (KeyError, ValueError, TypeError):
            a, b, c, d = 1, 0, 0, 1
        self.transposed = abs(b) + abs(c) > abs(a) + abs(d)
        across, down = (c, b) if self.transposed else (a, d)
        self.mirrored, self.flipped = across < 0, down < 0

    def apply(self, image: np.ndarray) -> np.ndarray:
        if self.transposed:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


def pixel_aspect(declared: Fraction | None) -> float:
    """Width over height of one stored pixel; values that no camera writes count as 1."""
    value = float(declared) if declared else 1.0
    return value if 1 / 8 <= value <= 8 else 1.0


class Fitter:
    """Turns frames into `(height, width, 3)` uint8, all of one size: the wanted one or that of the first frame.

    Args:
        size: (height, width), the short side, or None for every stored pixel as it is.
        fit: "crop" covers the wanted size and cuts what stands over; "pad" shows all of it between black bars; "none"
            only brings the short side to `size`.
        crop_at: which part a crop keeps: (0, 0) is top left, (0.5, 0.5) the centre, (1, 1) bottom right.
        zoom: of a crop: 0 shows as much of the picture as fits, 1 as little as shows every stored pixel, and what is
            between lies evenly in scale.
        most_pixels: of one scaled frame, before the cut.

    One reused scaler does it: a new one a frame costs several times as much. Transparent pixels stand on white.
    """

    def __init__(
        self,
        size: Size,
        fit: Fit = "crop",
        crop_at: tuple[float, float] = (0.5, 0.5),
        most_pixels: int = 40_000_000,
        zoom: float = 0.0,
    ) -> None:
        self.size, self.fit, self.crop_at, self.most_pixels = wanted(size, fit), fit, crop_at, most_pixels
        if len(crop_at) != 2 or not all(0 <= part <= 1 for part in crop_at):
            raise ValueError(f"crop_at={crop_at!r} must be two numbers from 0 (top, left) to 1 (bottom, right)")
        if not 0 <= zoom <= 1:
            raise ValueError(f"zoom={zoom!r} must be from 0 (all of the picture) to 1 (every stored pixel)")
        self.zoom = zoom
        self.scaler = VideoReformatter()
        self.result: tuple[int, int] | None = None
        self.plans: dict[tuple[int, int, bool], tuple[int, int]] = {}  # stored size -> scaled size, before turning

    def _scaled(self, height: float, width: float) -> tuple[int, int]:
        """Height and width of an upright picture after scaling, before a crop or bars."""
        if self.result is not None and not isinstance(self.size, tuple):  # the stream changed its size on the way
            scale = min(self.result[0] / height, self.result[1] / width)
        elif self.size is None:
            scale = 1.0
        elif isinstance(self.size, int):
            scale = self.size / min(height, width)
        else:
            ratios = self.size[0] / height, self.size[1] / width
            scale = min(ratios) if self.fit == "pad" else max(ratios)
            if self.fit == "crop" and scale < 1:
                scale **= 1 - self.zoom
        shown = max(1, round(height * scale)), max(1, round(width * scale))
        if shown[0] * shown[1] > self.most_pixels:
            raise ValueError(
                f"scaling {width:.0f} x {height:.0f} to size={self.size} makes {shown[1]} x {shown[0]} pixels, over "
                f"{self.most_pixels}: use fit='pad' or leave the file out"
            )
        return shown

    def __call__(self, frame: VideoFrame, aspect: float = 1.0) -> np.ndarray:
        orientation = Orientation(frame)
        kind = frame.height, frame.width, orientation.transposed
        if kind not in self.plans:
            height, width = frame.height, frame.width * (1.0 if self.size is None else aspect)
            shown = self._scaled(*((width, height) if orientation.transposed else (height, width)))
            if self.result is None:
                self.result = self.size if isinstance(self.size, tuple) else shown
            self.plans[kind] = shown[::-1] if orientation.transposed else shown
        return self._cut_or_padded(orientation.apply(self._rgb(frame, *self.plans[kind])))

    def _rgb(self, frame: VideoFrame, height: int, width: int) -> np.ndarray:
        alpha = any(component.is_alpha for component in frame.format.components)
        same = (height, width) == (frame.height, frame.width)
        frame = self.scaler.reformat(
            frame, width=width, height=height, format="rgba" if alpha else "rgb24", threads=1,
            interpolation=Interpolation.BILINEAR if same else Interpolation.BICUBIC,
        )  # fmt: skip
        image = frame.to_ndarray()
        return on_white(image) if alpha else image

    def _cut_or_padded(self, image: np.ndarray) -> np.ndarray:
        height, width = self.result
        tall, wide = image.shape[:2]
        if (tall, wide) == (height, width):
            return image
        if tall >= height and wide >= width:
            top, left = round((tall - height) * self.crop_at[0]), round((wide - width) * self.crop_at[1])
            return image[top : top + height, left : left + width]
        framed = np.zeros((height, width, 3), np.uint8)
        top, left = (height - tall) // 2, (width - wide) // 2
        framed[top : top + tall, left : left + wide] = image
        return framed


def on_white(rgba: np.ndarray) -> np.ndarray:
    """`(H, W, 4)` uint8 with straight alpha laid on white."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
