"""Still and animated pictures (PNG, JPEG, WebP, BMP, TIFF) as timed frames, by Pillow; it knows EXIF orientation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from av import VideoFrame
from PIL import Image, ImageOps

from reelm.data.fitting import on_white

KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is a picture rather than a video (GIF counts as a video)."""
    return head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


def pictures(file: str | os.PathLike[str] | BinaryIO, most_pixels: int, most_bytes: int) -> Iterator[
    tuple[float, float, VideoFrame]
]:  # fmt: skip
    """(time, how long it shows, upright RGB frame) of each picture in the file; a still shows for 0 seconds.

    Size is checked before anything is decoded. Transparent pixels stand on white.
    """
    size = os.path.getsize(file) if isinstance(file, (str, os.PathLike)) else file.seek(0, os.SEEK_END)
    if size > most_bytes:
        raise ValueError(f"{size} bytes are more than {most_bytes}")
    if not isinstance(file, (str, os.PathLike)):
        file.seek(0)
    with Image.open(file, formats=KINDS) as image:
        if image.width * image.height > most_pixels:
            raise ValueError(f"{image.width} x {image.height} are more than {most_pixels} pixels")
        moment = 0.0
        animated = getattr(image, "is_animated", False) and image.format != "TIFF"
        for number in range(image.n_frames if animated else 1):
            if number:
                image.seek(number)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):  # 16-bit grey
                grey = np.asarray(upright, np.float32) / (65535 if upright.mode != "F" else 1)
                pixels = np.repeat((grey.clip(0, 1) * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)
            elif upright.has_transparency_data:
                pixels = on_white(np.asarray(upright.convert("RGBA")))
            else:
                pixels = np.asarray(upright.convert("RGB"))
            lasts = max(float(image.info.get("duration", 100)), 10.0) / 1000 if animated else 0.0
            yield moment, lasts, VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            moment += lasts
