"""Spectra of sounds: what a loss compares and what a measure counts."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def mel_filters(rate: int, window: int, bands: int) -> Tensor:
    """Triangles of equal width on the mel scale (2595 log10(1 + f / 700)) from 0 to half the rate, each with a peak
    of 1: `(bands, window // 2 + 1)`."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 1400, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, float(top), bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0).float()


def spectrogram(sound: Tensor, window: int, hop: int) -> Tensor:
    """Complex short-time Fourier transform `(..., window // 2 + 1, frames)` of `(..., N)`, with a Hann window.

    Scaled so that a sine of amplitude 1 has magnitude 1 at its frequency; silence is added at both ends.
    """
    shape = torch.hann_window(window, device=sound.device)
    flat = sound.reshape(-1, sound.shape[-1]).float()
    made = torch.stft(flat, window, hop, window=shape, center=True, pad_mode="constant", return_complex=True)
    return (made * (2 / shape.sum())).unflatten(0, sound.shape[:-1])


def mel_spectrogram(sound: Tensor, rate: int, window: int, hop: int, bands: int) -> Tensor:
    """Magnitudes in bands of the mel scale, `(..., bands, frames)` of `(..., N)` at `rate` samples a second."""
    power = spectrogram(sound, window, hop)
    # the square root of no power has no slope; the smallest numbers are far below what is heard
    magnitude = (power.real.square() + power.imag.square() + 1e-14).sqrt()
    return mel_filters(rate, window, bands).to(magnitude) @ magnitude
