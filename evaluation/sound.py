"""How near a reconstructed sound is to the true one.

All sounds are `(B, C, N)` in [-1, 1]; figures are per sound, `(B,)`. Channels count together, so that a voice on the
wrong side is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelm.data.spectrum import mel_spectrogram, spectrogram


def snr(reconstruction: Tensor, sound: Tensor) -> Tensor:
    """Signal-to-noise ratio in dB. Silence, which no ratio fits, counts as a signal of -60 dB."""
    noise = (reconstruction.float() - sound).square().flatten(1).mean(1)
    return 10 * torch.log10(sound.square().flatten(1).mean(1).clamp_min(1e-6) / noise.clamp_min(1e-10))


def si_sdr(reconstruction: Tensor, sound: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, arXiv:1811.02508): the SNR after the best
    single gain, so that loudness does not count."""
    made, true = reconstruction.float().flatten(1), sound.flatten(1)
    gain = (made * true).sum(1, keepdim=True) / true.square().sum(1, keepdim=True).clamp_min(1e-8)
    wanted = gain * true
    ratio = wanted.square().sum(1).clamp_min(1e-10) / (made - wanted).square().sum(1).clamp_min(1e-10)
    return 10 * torch.log10(ratio)


def mel_distance(reconstruction: Tensor, sound: Tensor, rate: int) -> Tensor:
    """Mean difference of mel spectrograms in dB: 64 bands, windows of 64 ms, at most 80 dB below full scale."""
    window = 2 ** round(0.064 * rate).bit_length() // 2  # the power of two below or at 64 ms
    levels = [
        20 * torch.log10(mel_spectrogram(each, rate, window, window // 4, 64).clamp_min(1e-4))
        for each in (reconstruction, sound)
    ]
    return (levels[0] - levels[1]).abs().flatten(1).mean(1)


def _power(sound: Tensor) -> Tensor:
    """Power over the whole length and all channels at the multiples of `rate / (4 N)`: `(B, 2 N + 1)`."""
    window = torch.hann_window(sound.shape[-1], device=sound.device)
    return torch.fft.rfft(sound.float() * window, 4 * sound.shape[-1]).abs().square().sum(1)


def strongest_frequency(sound: Tensor, rate: int) -> Tensor:
    """The frequency in hertz at which a sound has most power."""
    return _power(sound).argmax(-1) * (rate / (4 * sound.shape[-1]))


def pitch_kept(reconstruction: Tensor, sound: Tensor, rate: int) -> Tensor:
    """Whether the strongest frequency, within a quarter tone (3 %), is still one of the strongest: bool.

    There the reconstruction has at least half of the power that it has anywhere: two voices may be equally loud.
    """
    true, power = strongest_frequency(sound, rate), _power(reconstruction)
    frequencies = torch.arange(power.shape[-1], device=power.device) * (rate / (4 * sound.shape[-1]))
    near = (frequencies - true[:, None]).abs() <= 0.03 * true[:, None]
    return (power * near).amax(-1) >= 0.5 * power.amax(-1)


def picture(sound: Tensor, window: int = 1024) -> Tensor:
    """Spectrograms to look at, low frequencies below, 60 dB from black to white, the first channel left of the second:
    `(B, 3, 1, 128, W)` in [-1, 1] of `(B, C, N)`; frequencies up to a quarter of the rate."""
    level = spectrogram(sound, window, window // 4)[:, :, : window // 4].abs()
    level = 20 * torch.log10(level.clamp_min(1e-3)) / 30 + 1  # -60 dB is -1, full scale 1
    gap = level.new_ones(*level.shape[:-1], 1)
    level = torch.cat([level, gap], -1).flip(2).transpose(1, 2).flatten(2)[..., :-1]
    return level[:, ::2, None].movedim(2, 1).unsqueeze(1).expand(-1, 3, -1, -1, -1).clamp(-1, 1)
