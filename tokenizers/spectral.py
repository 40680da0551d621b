"""The spectral loss of audio tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from reelm.data.spectrum import mel_spectrogram


class SpectralLoss(nn.Module):
    """Distance of mel spectrograms of several windows (SoundStream, arXiv:2107.03312, section III.E).

    For each window s, hops of s / 4: the L1 distance of the spectrograms and, weighted by sqrt(s / 2), the L2 distance
    of their logarithms. Means over bands, frames and windows stand in place of the paper's sums, so that the value
    depends on no length, and small windows have fewer bands than the paper's 64, as many as they can tell apart.

    Args:
        rate: samples a second.
        windows: in samples.
        bands: of the mel scale, at most an eighth of the window.
        floor: amplitude below which the logarithm hears nothing; a sine of amplitude 1 has 1.
    """

    def __init__(
        self,
        rate: int,
        windows: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
        bands: int = 64,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.rate, self.windows, self.bands, self.floor = rate, tuple(windows), bands, floor

    def forward(self, reconstruction: Tensor, sound: Tensor) -> Tensor:
        """Of sounds `(B, C, N)`; a scalar."""
        total = reconstruction.new_zeros(())
        for window in self.windows:
            size = self.rate, window, window // 4, min(self.bands, window // 8)
            ours, theirs = mel_spectrogram(reconstruction, *size), mel_spectrogram(sound, *size)
            logarithms = (ours + self.floor).log() - (theirs + self.floor).log()
            distance = (logarithms.square().mean(-2) + 1e-12).sqrt().mean()
            total = total + (ours - theirs).abs().mean() + math.sqrt(window / 2) * distance
        return total / len(self.windows)
