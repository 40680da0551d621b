"""How near a reconstruction is to its clip, and how many bits it took.

All videos are `(B, 3, T, H, W)` RGB in [-1, 1]. Figures are per clip, `(B,)`, and nothing is rounded to 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

Distance = Callable[[Tensor, Tensor], Tensor]  # of images (N, 3, H, W) in [-1, 1]: (N,)


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: `(B,)`. The peak is 2, the width of [-1, 1], to which the first is clipped.

    The squared error is averaged over all frames before the logarithm is taken (as of a whole clip, not the mean of
    the frames' PSNR, which one perfect frame would carry away). Equal clips get 106 dB rather than infinity, so that
    means and JSON survive them.
    """
    error = F.mse_loss(reconstruction.float().clamp(-1, 1), video, reduction="none").flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


def mean_over_frames(distance: Distance, reconstruction: Tensor, video: Tensor, at_once: int = 8) -> Tensor:
    """A measure of images on each frame, the mean of each clip: `(B,)`; `at_once` frames bound the memory."""
    frames = zip(*(v.transpose(1, 2).flatten(0, 1).split(at_once) for v in (reconstruction, video)))
    return torch.cat([distance(a, b) for a, b in frames]).view(len(video), -1).mean(1)


def _ssim_of_images(a: Tensor, b: Tensor) -> Tensor:
    # SSIM's luminance term looks at means, so its constants are for pixels that are 0 when they are black
    a, b = ((image.float().clamp(-1, 1) + 1) / 2 for image in (a, b))
    each = structural_similarity_index_measure(
        a, b, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )[1]
    return each[..., 5:-5, 5:-5].mean((1, 2, 3))  # the library mirrors the edges, the paper leaves them out


def ssim(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861), mean over frames: `(B,)`.

    A Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01 and K2 = 0.03, where the window lies wholly inside; the mean
    of the three colour channels. Raises ValueError for frames smaller than the window.
    """
    if min(video.shape[3:]) < 11:
        raise ValueError(f"SSIM needs frames of at least 11 x 11 pixels; got {video.shape[3]} x {video.shape[4]}")
    return mean_over_frames(_ssim_of_images, reconstruction, video)


def bits_per_pixel(bits: float, video: Tensor) -> float:
    """Bits over the number of pixels of all frames (a pixel has three colours)."""
    return bits / (video.numel() / video.shape[1])


def token_usage(tokens: Tensor, vocabulary: int | None) -> dict[str, float]:
    """What tokens cost, and of ids how the codes are used (`code_usage`). Latents `(..., D)`, which have no vocabulary,
    count as 16 bits a number, in which they are stored."""
    if vocabulary is not None:
        return code_usage(tokens, vocabulary)
    return {"numbers_per_token": tokens.shape[-1], "bits_per_token": 16.0 * tokens.shape[-1]}


def code_usage(ids: Tensor, vocabulary: int) -> dict[str, float]:
    """Which of `vocabulary` codes occur among the ids, of any shape, and how evenly.

    codes_used: different ones. entropy: of their frequencies, in bits a token; no more than log2 of the number of
    tokens, so that a short clip says little. perplexity: 2^entropy, the number of codes that, equally frequent, would
    have this entropy. bits_per_token: log2(vocabulary), what a token costs where nothing is known of frequencies.
    """
    counts = torch.unique(ids, return_counts=True)[1].double()
    share = counts / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    return {
        "codes_used": len(counts),
        "vocabulary": vocabulary,
        "perplexity": 2**entropy,
        "entropy": entropy,
        "bits_per_token": math.log2(vocabulary),
    }
