"""The adversary of the audio tokenizer: discriminators of the waveform and of its short-time Fourier transform
(SoundStream, arXiv:2107.03312, section III.D), hinge losses and feature matching (section III.E).

As for video (`discriminator.py`), both players are trained in one joint pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from reelm.data.spectrum import spectrogram
from reelm.tokenizers.discriminator import discriminator_loss, generator_loss


class WaveDiscriminator(nn.Module):
    """MelGAN's (arXiv:1910.06711, appendix A): grouped convolutions that each keep every fourth place.

    Args:
        channels: of the sound.
        width: of the first layer; the following ones have 4 times that of the one before, at most 64 times the first.
        scale: samples that are averaged to one before it looks.
    """

    def __init__(self, channels: int, width: int = 16, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        widths = [width, *(min(4 ** (i + 1), 64) * width for i in range(4))]
        layers = [nn.Conv1d(channels, width, 15, padding=7)]
        for a, b in zip(widths, widths[1:], strict=False):
            layers.append(nn.Conv1d(a, b, 41, 4, padding=20, groups=max(a // 4, 1)))
        layers.append(nn.Conv1d(widths[-1], widths[-1], 5, padding=2))
        self.layers = nn.ModuleList(layers)
        self.score = nn.Conv1d(widths[-1], 1, 3, padding=1)

    def forward(self, sound: Tensor) -> list[Tensor]:
        """`(B, C, N)` to what each layer makes; the last are scores along the sound, high for real ones."""
        x = F.avg_pool1d(sound, 2 * self.scale, self.scale, self.scale // 2) if self.scale > 1 else sound
        made = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            made.append(x)
        return [*made, self.score(x)]


class SpectrumBlock(nn.Module):
    """A residual unit of two convolutions, the second of which down-samples time and frequency."""

    def __init__(self, cin: int, cout: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cin, 3, padding=1)
        self.conv2 = nn.Conv2d(cin, cout, [s + 2 for s in stride], stride, stride)
        self.shortcut = nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        side = self.shortcut(x)
        return h[..., : side.shape[-2], : side.shape[-1]] + side


class SpectrumDiscriminator(nn.Module):
    """Looks at the real and imaginary parts of the short-time Fourier transform of all channels.

    Args:
        channels: of the sound.
        width: of the first block. window, hop: of the transform, in samples.
        growth: of the width, and stride (time, frequency), for each block.
    """

    def __init__(self, channels: int, width: int = 32, window: int = 1024, hop: int = 256) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        growth, strides = (1, 2, 4, 4, 8, 8), ((1, 2), (2, 2), (1, 2), (2, 2), (1, 2), (2, 2))
        widths = [width, *(width * each for each in growth)]
        self.first = nn.Conv2d(2 * channels, width, 7, padding=3)
        self.blocks = nn.ModuleList(
            SpectrumBlock(a, b, s) for a, b, s in zip(widths, widths[1:], strides, strict=False)
        )
        self.score = nn.Conv2d(widths[-1], 1, (1, window // 2 // 64))

    def forward(self, sound: Tensor) -> list[Tensor]:
        """`(B, C, N)` to what each layer makes; the last are scores along the sound, high for real ones."""
        spectrum = spectrogram(sound, self.window, self.hop)[:, :, :-1].transpose(2, 3)  # (B, C, time, frequency)
        x = self.first(torch.cat([spectrum.real, spectrum.imag], 1))
        made = [x]
        for block in self.blocks:
            x = block(x)
            made.append(x)
        return [*made, self.score(F.leaky_relu(x, 0.2))]


class SoundDiscriminator(nn.ModuleList):
    """A discriminator of the spectrum, and one of the waveform at each scale.

    Args:
        channels: of the sound.
        width: of the spectrum's first block; the waveform's have half of it.
        window: of the spectrum, in samples; hops are a quarter.
        scales: of the waveform.
    """

    def __init__(
        self, channels: int = 2, width: int = 32, window: int = 1024, scales: Sequence[int] = (1, 2, 4)
    ) -> None:
        if window < 128 or window & (window - 1):
            raise ValueError(f"window={window} is no power of two from 128 on")
        parts = [WaveDiscriminator(channels, width // 2, scale) for scale in scales]
        super().__init__([SpectrumDiscriminator(channels, width, window, window // 4), *parts])

    def forward(self, sound: Tensor) -> list[list[Tensor]]:
        """`(B, C, N)` to what the layers of each discriminator make."""
        return [part(sound) for part in self]


def feature_matching(fake: list[list[Tensor]], real: list[list[Tensor]]) -> Tensor:
    """Mean distance of what the layers before the score make of a sound and of its reconstruction."""
    pairs = [(a, b) for ours, theirs in zip(fake, real, strict=True) for a, b in zip(ours[:-1], theirs[:-1])]
    return torch.stack([F.l1_loss(a.float(), b.detach().float()) for a, b in pairs]).mean()


class SoundAdversary(nn.Module):
    """The adversarial terms of an audio tokenizer's loss.

    Args:
        discriminator: from sounds to lists of lists of features (`SoundDiscriminator`).
        weight: of the generator's hinge term. features: weight of feature matching.
        start: batches before the generator listens; the discriminator learns from the first one on.
        lr: learning rate of the discriminator at its peak.
    """

    betas = (0.5, 0.9)  # of AdamW for the discriminator (MelGAN, arXiv:1910.06711, section 3)
    steps: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        weight: float = 1.0,
        features: float = 100.0,
        start: int = 0,
        lr: float = 1e-4,
    ) -> None:
        super().__init__()
        self.discriminator, self.weight, self.features = discriminator, weight, features
        self.start, self.lr = start, lr
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of training; kept for exact resume

    def forward(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, with gradients for the generator and the discriminator, and each by name.

        fake: reconstructions `(B, C, N)`; real: the sounds themselves.
        """
        constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        of_real, of_fake = self.discriminator(real), self.discriminator(fake.detach())
        heard = functional_call(self.discriminator, constants, fake)
        parts, listens = len(heard), float(self.steps >= self.start)
        scores = [(real[-1].float(), fake[-1].float()) for real, fake in zip(of_real, of_fake, strict=True)]
        terms = {
            "adversarial": listens * sum(generator_loss(part[-1].float(), "hinge") for part in heard) / parts,
            "features": listens * feature_matching(heard, of_real),
            "discriminator": sum(discriminator_loss(real, fake, "hinge") for real, fake in scores) / parts,
        }
        total = self.weight * terms["adversarial"] + self.features * terms["features"] + terms["discriminator"]
        if self.training:
            self.steps += 1
        return total, {name: value.detach() for name, value in terms.items()}
