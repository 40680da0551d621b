"""Controls made from pixels: flow of known motions, the stand-in for depth, and the packed control video."""

import pytest
import torch
import torch.nn.functional as F

from reelm.data import controls
from reelm.data.clip import Clip
from reelm.data.controls import control_image, flow, lucas_kanade, pseudo_depth, with_controls


def textured(size: int) -> torch.Tensor:
    """A smooth pattern with coarse and fine parts, as pictures have."""
    generator, picture = torch.Generator().manual_seed(0), torch.zeros(1, 3, size, size)
    for cell, strength in ((4, 0.25), (8, 0.4), (24, 0.6)):
        noise = torch.randn(1, 3, -(-size // cell), -(-size // cell), generator=generator)
        picture += strength * F.interpolate(noise, size=(size, size), mode="bicubic")
    return picture.tanh()[0]


def sliding(dx: float, dy: float, frames: int = 3, size: int = 64) -> torch.Tensor:
    """(1, 3, T, H, W) cut from a larger texture, so that the picture moves by (dx, dy) pixels a frame."""
    big = textured(2 * size)[None]
    step = torch.arange(size) + size / 2
    clips = []
    for t in range(frames):
        y, x = torch.meshgrid(step - t * dy, step - t * dx, indexing="ij")
        grid = (torch.stack([x, y], -1)[None] + 0.5) / size - 1
        clips.append(F.grid_sample(big, grid, align_corners=False))
    return torch.stack(clips, 2)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.0, 0.0), (-0.5, 0.25), (3.0, -2.0), (-6.0, 5.0)])
def test_lucas_kanade_finds_a_known_shift(shift):
    video = sliding(*shift)
    found = lucas_kanade(video[:, :, 0].mean(1), video[:, :, 1].mean(1))[0, :, 12:-12, 12:-12]
    expected = torch.tensor(shift).view(2, 1, 1)
    assert (found - expected).norm(dim=0).median() < 0.15
    assert ((found - expected).norm(dim=0) < 0.5).float().mean() > 0.9


def test_flow_has_a_frame_for_each_frame_and_repeats_the_last():
    found = flow(sliding(2.0, 1.0, frames=3))
    assert found.shape == (1, 2, 3, 64, 64)
    assert torch.equal(found[:, :, 2], found[:, :, 1])
    assert (found[0, :, 0, 12:-12, 12:-12].flatten(1).median(1).values - torch.tensor([2.0, 1.0])).abs().max() < 0.2
    assert flow(torch.zeros(2, 3, 1, 8, 8)).abs().max() == 0


def test_opencv_agrees_where_it_is_installed():
    if controls.cv2 is None:
        pytest.skip("opencv-python-headless is not installed")
    video = sliding(3.0, -2.0, frames=2)
    found = controls._dis(video[:, :, 0].mean(1), video[:, :, 1].mean(1))[0, :, 12:-12, 12:-12]
    assert (found.flatten(1).median(1).values - torch.tensor([3.0, -2.0])).abs().max() < 0.3


def test_a_plain_picture_does_not_move():
    assert flow(torch.full((1, 3, 4, 32, 40), 0.3)).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (9, 33)])
def test_small_and_odd_sizes_work(size):
    video = torch.rand(2, 3, 2, *size) * 2 - 1
    assert flow(video).shape == (2, 2, 2, *size) and torch.isfinite(flow(video)).all()
    assert pseudo_depth(video).shape == (2, 1, 2, *size)


def test_pseudo_depth_puts_the_object_before_the_ground():
    video = torch.full((1, 3, 2, 64, 64), -0.5)
    video[:, 0, :, 20:40, 20:40] = 1.0
    depth = pseudo_depth(video)
    assert depth.shape == (1, 1, 2, 64, 64) and 0 <= depth.min() and depth.max() <= 1
    assert depth[..., 25:35, 25:35].min() > 0.9 and depth[..., :10, :].max() < 0.05
    assert pseudo_depth(torch.full((1, 3, 1, 16, 16), 0.2)).max() == 0


def test_control_image_packs_flow_and_depth():
    moved = torch.zeros(1, 2, 2, 10, 100)
    moved[:, 0], moved[:, 1] = 4.0, -80.0  # half of 8 % of the width, and far beyond
    depth = torch.full((1, 1, 2, 10, 100), 0.75)
    packed = control_image(depth, moved)
    assert packed.shape == (1, 3, 2, 10, 100)
    assert packed[0, :, 0, 0, 0].tolist() == pytest.approx([0.5, -1.0, 0.5])
    with pytest.raises(ValueError, match="must agree"):
        control_image(depth[:, :, :1], moved)


def test_with_controls_keeps_the_truth_and_names_what_it_cannot_make():
    clip = Clip(sliding(1.0, 0.0), controls={"depth": torch.zeros(1, 1, 3, 64, 64)})
    done = with_controls(clip, ("depth", "flow"))
    assert done.controls["depth"].abs().max() == 0 and done.controls["flow"].shape == (1, 2, 3, 64, 64)
    with pytest.raises(ValueError, match="'camera'.*flow and depth"):
        with_controls(clip, ("camera",))
