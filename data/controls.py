"""Controls for clips that come without truth: optical flow, a stand-in for depth, and both as one video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reelm.data.clip import Clip

try:  # the optional extra "flow"; any failure to load means doing without it
    import cv2
except (ImportError, OSError):
    cv2 = None


def flow(video: Tensor) -> Tensor:
    """Optical flow `(B, 2, T, H, W)` of `(B, 3, T, H, W)` in [-1, 1]: (x, y) pixels to the next frame.

    What is at (x, y) in frame t is at (x, y) + flow in frame t + 1. The last frame repeats the flow before it; one
    frame alone does not move. OpenCV's DIS where it is installed, pyramidal Lucas-Kanade otherwise.
    """
    batch, _, frames, height, width = video.shape
    if frames == 1:
        return video.new_zeros(batch, 2, 1, height, width)
    grey = video.float().mean(1)
    here, there = grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)
    moved = (_dis if cv2 is not None and min(height, width) >= 16 else lucas_kanade)(here, there)
    moved = moved.to(video.dtype).unflatten(0, (batch, frames - 1)).transpose(1, 2)
    return torch.cat([moved, moved[:, :, -1:]], dim=2)


def _dis(here: Tensor, there: Tensor) -> Tensor:
    """Dense inverse search (Kroeger et al., 2016) on each pair of `(N, H, W)` images in [-1, 1]."""
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = [((image + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy() for image in (here, there)]
    flows = np.stack([search.calc(a, b, None) for a, b in zip(*pairs)])
    return torch.from_numpy(flows).permute(0, 3, 1, 2).to(here.device)


def _warped(image: Tensor, offset: Tensor) -> Tensor:
    """`(N, 1, H, W)` sampled at each pixel plus `offset` (N, 2, H, W); edges repeat."""
    _, _, height, width = image.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([x, y]).to(offset) + offset
    grid = (grid + 0.5) * 2 / offset.new_tensor([width, height]).view(2, 1, 1) - 1
    return F.grid_sample(image, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of every channel of `(N, C, H, W)`; edges repeat."""
    radius = max(1, round(2.5 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=image.device) / sigma) ** 2)
    weights = (weights / weights.sum()).to(image.dtype)
    shape = image.shape
    image = image.flatten(0, 1)[:, None]
    image = F.conv2d(F.pad(image, (radius, radius, 0, 0), mode="replicate"), weights.view(1, 1, 1, -1))
    image = F.conv2d(F.pad(image, (0, 0, radius, radius), mode="replicate"), weights.view(1, 1, -1, 1))
    return image.view(shape)


def lucas_kanade(here: Tensor, there: Tensor, sigma: float = 3.0, steps: int = 4) -> Tensor:
    """Flow `(N, 2, H, W)` between `(N, H, W)` images: Lucas and Kanade (1981) from coarse to fine (Bouguet, 2001).

    Around each pixel (Gaussian window of `sigma`) it solves for the shift that explains the change in brightness, again
    and again with the second image moved by what was found, first on small images. Without texture it says 0.
    """
    here, there = here[:, None], there[:, None]
    height, width = here.shape[-2:]
    levels = max(0, min(5, int(np.log2(max(min(height, width), 1) / 12))))
    pyramid = [(_blurred(here, 0.7), _blurred(there, 0.7))]
    for _ in range(levels):
        pyramid.append(tuple(F.avg_pool2d(_blurred(image, 0.8), 2, ceil_mode=True) for image in pyramid[-1]))
    found = here.new_zeros(len(here), 2, *pyramid[-1][0].shape[-2:])
    for a, b in reversed(pyramid):
        rows, columns = a.shape[-2:]
        if found.shape[-2:] != (rows, columns):
            ratio = found.new_tensor([columns / found.shape[-1], rows / found.shape[-2]]).view(1, 2, 1, 1)
            found = F.interpolate(found, size=(rows, columns), mode="bilinear", align_corners=False) * ratio
        padded = F.pad(a, (1, 1, 1, 1), mode="replicate")
        across, down = (
            (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2,
            (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2,
        )
        xx, xy, yy = _blurred(torch.cat([across**2, across * down, down**2], 1), sigma).chunk(3, 1)
        floor = 1e-3  # brightness gradients below 0.03 a pixel are noise
        determinant = (xx + floor) * (yy + floor) - xy**2
        for _ in range(steps):
            change = a - _warped(b, found)
            ex, ey = _blurred(torch.cat([across * change, down * change], 1), sigma).chunk(2, 1)
            step = torch.cat([(yy + floor) * ex - xy * ey, (xx + floor) * ey - xy * ex], 1) / determinant
            found = found + step.clamp(-1, 1)
        found = _blurred(found, 0.7)
    return found


def pseudo_depth(video: Tensor) -> Tensor:
    """A stand-in for depth `(B, 1, T, H, W)` in [0, 1], 1 near: how far each colour is from the background's.

    The background is the median colour of the frame's border. This is no depth network: it tells figure from ground on
    plain backgrounds and nothing about distance. Slightly blurred in space.
    """
    batch, _, frames, height, width = video.shape
    images = video.transpose(1, 2).flatten(0, 1).float()
    edge = max(1, min(height, width) // 16)
    inner = torch.zeros(height, width, dtype=torch.bool, device=video.device)
    inner[edge : height - edge, edge : width - edge] = True
    background = images[:, :, ~inner].median(-1).values[..., None, None]
    distance = (images - background).norm(dim=1, keepdim=True)
    distance = _blurred(distance, max(0.5, min(height, width) / 64))
    far = distance.flatten(1).amax(1).clamp(min=0.2).view(-1, 1, 1, 1)  # an empty frame stays far, its noise too
    return (distance / far).clamp(0, 1).to(video.dtype).view(batch, frames, 1, height, width).transpose(1, 2)


FLOW_SCALE = 0.08  # a flow of this share of the width fills the channel


def control_image(depth: Tensor, flow: Tensor) -> Tensor:
    """Depth and flow as one video `(B, 3, T, H, W)` in [-1, 1] that the tokenizer of RGB video takes (VideoPoet, 3.2).

    Args:
        depth: `(B, 1, T, H, W)` in [0, 1].
        flow: `(B, 2, T, H, W)` in pixels to the next frame.

    Channels: flow x, flow y (both over 8 % of the width, clipped), depth.
    """
    if (
        depth.shape[0] != flow.shape[0]
        or depth.shape[2:] != flow.shape[2:]
        or (depth.shape[1], flow.shape[1]) != (1, 2)
    ):
        raise ValueError(
            f"depth (B, 1, T, H, W) and flow (B, 2, T, H, W) must agree; got {tuple(depth.shape)}, {tuple(flow.shape)}"
        )
    motion = (flow / (FLOW_SCALE * flow.shape[-1])).clamp(-1, 1)
    return torch.cat([motion, depth.clamp(0, 1) * 2 - 1], dim=1)


MADE = {"flow": flow, "depth": pseudo_depth}  # what can be made of any clip


def with_controls(clip: Clip, names: Sequence[str]) -> Clip:
    """The clip with the named controls that it lacks made from its pixels; ValueError for one that cannot be made."""
    missing = [name for name in names if name not in clip.controls]
    unknown = [name for name in missing if name not in MADE]
    if unknown:
        raise ValueError(f"control {unknown[0]!r} is not in this source; {' and '.join(MADE)} can be made of any clip")
    return (
        clip.replace(controls={**clip.controls, **{name: MADE[name](clip.video) for name in missing}})
        if missing
        else clip
    )
