"""Measures of reconstructions, against slow references and values known from elsewhere."""

import math

import pytest
import torch

from reelm.evaluation.reconstruction import bits_per_pixel, code_usage, mean_over_frames, psnr, ssim


def pair(batch: int = 2, frames: int = 3, height: int = 16, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth videos and noisy copies."""
    y, x = torch.linspace(0, 3, height).view(-1, 1), torch.linspace(0, 3, width)
    phase = torch.rand(batch, 3, frames, 1, 1) * 6
    video = torch.sin(phase + x + 2 * y)
    return (video + 0.2 * torch.randn_like(video)).clamp(-1, 1), video


def test_psnr_of_known_errors():
    video = torch.zeros(2, 3, 4, 8, 8)
    off = video.clone()
    off[0] += 0.2  # a tenth of the peak of 2
    off[1] += 0.02
    torch.testing.assert_close(psnr(off, video), torch.tensor([20.0, 40.0]))


def test_psnr_averages_the_error_before_the_logarithm():
    video = torch.zeros(1, 3, 4, 8, 8)
    off = video.clone()
    off[:, :, 0] = 0.4  # one frame of four at 14 dB, three perfect
    assert psnr(off, video).item() == pytest.approx(10 * math.log10(4 / (0.16 / 4)), abs=1e-4)


def test_psnr_is_that_of_eight_bits():
    """The usual definition on bytes, with a peak of 255."""
    a, b = (torch.randint(0, 256, (1, 3, 2, 8, 8)).double() for _ in range(2))
    usual = 10 * torch.log10(255**2 / (a - b).square().mean())
    assert psnr((a / 127.5 - 1).float(), (b / 127.5 - 1).float()).item() == pytest.approx(usual.item(), abs=1e-4)


def test_what_is_out_of_range_is_shown_clipped():
    video = torch.ones(1, 3, 1, 16, 16)
    assert psnr(video * 3, video) == psnr(video, video) and ssim(video * 3, video) == ssim(video, video)


def test_equal_clips_have_finite_figures():
    _, video = pair()
    assert (psnr(video, video) > 100).all() and psnr(video, video).isfinite().all()
    torch.testing.assert_close(ssim(video, video), torch.ones(2))


def slow_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wang et al. 2004 in loops, for images `(3, H, W)` in [0, 1]."""
    distance = torch.arange(11).double() - 5
    line = torch.exp(-distance.square() / (2 * 1.5**2))
    window = line[:, None] * line
    window /= window.sum()
    values = []
    for x, y in zip(a.double(), b.double()):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 0.01**2) * (2 * cov + 0.03**2)
                    / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2))
                )  # fmt: skip
    return float(torch.stack(values).mean())


def test_ssim_is_the_paper_s():
    noisy, video = pair(2, 2, 14, 17)
    want = [sum(slow_ssim((noisy[i, :, t] + 1) / 2, (video[i, :, t] + 1) / 2) for t in range(2)) / 2 for i in range(2)]
    torch.testing.assert_close(ssim(noisy, video), torch.tensor(want), atol=2e-5, rtol=0)
    assert 0.1 < want[0] < 0.95


def test_ssim_needs_its_window():
    noisy, video = pair(1, 1, 11, 11)
    assert 0 < ssim(noisy, video).item() < 1
    with pytest.raises(ValueError, match="at least 11 x 11 pixels; got 8 x 16"):
        ssim(torch.zeros(1, 3, 1, 8, 16), torch.zeros(1, 3, 1, 8, 16))


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_frames_are_counted_to_their_own_clip(at_once):
    a, b = torch.randn(3, 3, 5, 4, 4), torch.randn(3, 3, 5, 4, 4)
    seen = []

    def distance(x, y):
        seen.append(len(x))
        return (x - y).abs().mean((1, 2, 3))

    torch.testing.assert_close(mean_over_frames(distance, a, b, at_once), (a - b).abs().mean((1, 2, 3, 4)))
    assert max(seen) <= at_once and sum(seen) == 15


def test_a_pixel_counts_once():
    assert bits_per_pixel(4 * 5 * 6 * 0.5, torch.zeros(1, 3, 4, 5, 6)) == 0.5


def test_codes_that_are_used_evenly():
    usage = code_usage(torch.arange(16).repeat(5).view(2, 5, 8), 64)
    assert usage["codes_used"] == 16 and usage["vocabulary"] == 64 and usage["bits_per_token"] == 6
    assert usage["entropy"] == pytest.approx(4) and usage["perplexity"] == pytest.approx(16)


def test_codes_that_are_used_unevenly():
    usage = code_usage(torch.tensor([7, 7, 7, 3]), 1000)
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert usage["codes_used"] == 2 and usage["entropy"] == pytest.approx(entropy)
    assert usage["perplexity"] == pytest.approx(2**entropy) and usage["bits_per_token"] == pytest.approx(
        9.9658, abs=1e-4
    )
    assert code_usage(torch.tensor([5, 5]), 8)["perplexity"] == 1
