"""The causal tokenizer of sound: SoundStream (https://arxiv.org/abs/2107.03312, section III).

Latent k depends on the samples before `(k + 1) * compression` alone, so the ids of a prefix are the prefix of the ids.
Several channels are told apart by the first convolution and the last: one latent is of all of them. Folding samples
into patches in front, as the Haar patches of the video tokenizer, makes a small network several times cheaper;
`patch=1` is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.tokenizers.quantizers import ResidualVQ
from reelm.tokenizers.tokenizer import Past, Tokenizer


class CausalConv1d(nn.Conv1d):
    """1-D convolution whose outputs each see the samples up to the end of their own stride; what is before the first is
    silence and, in a stream, the last samples of the piece before."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        # Torch chooses among routines that add up in different orders by the shape of their input. A dilation (of no
        # effect on one tap) and a batch of two make that choice the same for pieces of any length.
        super().__init__(cin, cout, kernel, stride, dilation=dilation if kernel > 1 else 2)
        self.front = (kernel - 1) * self.dilation[0] - (stride - 1)

    def reset_parameters(self) -> None:
        # torch's own would make each layer softer than the one before, and latents all but equal to begin with
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        before = None if past is None else past.get(self)
        x = F.pad(x, (self.front, 0)) if before is None else torch.cat([before, x], 2)
        if past is not None:
            past[self] = x[:, :, x.shape[2] - self.front :].clone()  # a view would keep the whole piece
        return super().forward(x.expand(2, -1, -1))[:1] if len(x) == 1 else super().forward(x)


class ELU(nn.ELU):
    """Torch's, but for models in use, where its rounding would depend on how long a piece is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x.clamp_min(0) + x.clamp_max(0).expm1()


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a learned a for each channel, for what repeats (arXiv:2006.08195, arXiv:2306.06546)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.frequency * x).sin().square() / (self.frequency + 1e-9)


def activate(kind: str, channels: int) -> nn.Module:
    return Snake(channels) if kind == "snake" else ELU()


class ResidualUnit(nn.Module):
    """A dilated convolution of 7 and one of 1, each after an activation, and a shortcut."""

    def __init__(self, channels: int, dilation: int, kind: str) -> None:
        super().__init__()
        self.act1 = activate(kind, channels)
        self.conv1 = CausalConv1d(channels, channels, 7, dilation=dilation)
        self.act2 = activate(kind, channels)
        self.conv2 = CausalConv1d(channels, channels, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return x + self.conv2(self.act2(self.conv1(self.act1(x), past)), past)

    def begin_as_identity(self) -> None:
        """Makes a unit that deepens a trained network leave it as it is, to begin with."""
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)


class UpConv1d(nn.Module):
    """The paper's transposed convolution of twice the stride, as a convolution of two taps that makes `stride` samples
    of each."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv1d(cin, cout * stride, 2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return rearrange(self.conv(x, past), "b (c s) n -> b c (n s)", s=self.stride)


class Causal(nn.Sequential):
    """Parts in a row, most of which remember the past."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for part in self:
            x = part(x) if isinstance(part, (ELU, Snake)) else part(x, past)
        return x


class SoundStream(Tokenizer):
    """Causal audio tokenizer: sound `(B, channels, N)`, latents `(B, D, t)`, ids `(B, t, levels)`.

    A sound of any length is taken: silence fills it up to whole latents, and whoever needs the true length keeps it.
    Mono is doubled for a tokenizer of stereo, and stereo averaged for one of mono. A stream's pieces are whole latents,
    but for the last.

    Args:
        quantizer: a `ResidualVQ`, whose levels are the last axis of ids.
        widths: channels of each resolution level, finest first.
        strides: down-sampling between consecutive levels, one fewer than levels.
        channels: of the sound, 1 or 2.
        rate: samples a second that the tokenizer was trained for.
        patch: samples that are folded into one place in front.
        dilations: of the residual units at each level, one each.
        encoder_dilations: those of the encoder, where they differ; one that sees little around a latent gives a sound
            that stays the same the same ids again and again.
        activation: "elu" as in the paper or "snake".
    """

    cannot_grow = ("patch", "channels")
    decoding_only = ("decoder", "dilations")  # parts and arguments on which no token depends

    def __init__(
        self,
        quantizer: ResidualVQ,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int] = (2, 4, 5, 8),
        channels: int = 2,
        rate: int = 16_000,
        patch: int = 1,
        dilations: Sequence[int] = (1, 3, 9),
        encoder_dilations: Sequence[int] | None = None,
        activation: Literal["elu", "snake"] = "elu",
    ) -> None:
        super().__init__()
        widths, strides = list(widths), list(strides)
        if len(widths) != len(strides) + 1:
            raise ValueError(f"{len(widths)} widths ask for {len(widths) - 1} strides; got {len(strides)}")
        if channels not in (1, 2):
            raise ValueError(f"sound is mono or stereo; channels={channels} is neither")
        if activation not in ("elu", "snake"):
            raise ValueError(f"activation is elu or snake; got {activation}")
        self.quantizer, self.widths, self.strides = quantizer, widths, strides
        self.channels, self.rate, self.patch, self.activation = channels, rate, patch, activation
        self.dilations, self.encoder_dilations = list(dilations), list(encoder_dilations or dilations)
        self.compression = patch * math.prod(strides)

        # named, so that a deeper network can begin with the weights of a shallower one
        kind, encoder = activation, Causal()
        self.encoder = encoder
        encoder.add_module("first", CausalConv1d(channels * patch, widths[0], 7))
        for level, stride in enumerate(strides):
            for unit, dilation in enumerate(self.encoder_dilations):
                encoder.add_module(f"level{level}_unit{unit}", ResidualUnit(widths[level], dilation, kind))
            encoder.add_module(f"level{level}_act", activate(kind, widths[level]))
            down = CausalConv1d(widths[level], widths[level + 1], 2 * stride, stride)
            encoder.add_module(f"level{level}_down", down)
        encoder.add_module("act", activate(kind, widths[-1]))
        encoder.add_module("last", CausalConv1d(widths[-1], quantizer.dim, 3))

        decoder = self.decoder = Causal()
        decoder.add_module("first", CausalConv1d(quantizer.dim, widths[-1], 7))
        for level, stride in reversed(list(enumerate(strides))):
            decoder.add_module(f"level{level}_act", activate(kind, widths[level + 1]))
            decoder.add_module(f"level{level}_up", UpConv1d(widths[level + 1], widths[level], stride))
            for unit, dilation in enumerate(self.dilations):
                decoder.add_module(f"level{level}_unit{unit}", ResidualUnit(widths[level], dilation, kind))
        decoder.add_module("act", activate(kind, widths[0]))
        decoder.add_module("last", CausalConv1d(widths[0], channels * patch, 7))

    @property
    def levels(self) -> int:
        return self.quantizer.levels

    def length(self, latents: int, begins: bool) -> int:
        return latents * self.compression

    def mixed(self, sound: Tensor) -> Tensor:
        """`(B, 1 or 2, N)` with the tokenizer's number of channels."""
        if sound.ndim != 3 or sound.shape[1] not in (1, 2) or not sound.shape[2]:
            raise ValueError(f"a sound is (B, 1 or 2 channels, samples); got {tuple(sound.shape)}")
        return sound.mean(1, keepdim=True) if self.channels == 1 else sound.expand(-1, 2, -1)

    def encode_latents(self, signal: Tensor, past: Past | None = None) -> Tensor:
        """`(B, 1 or 2, N)` in [-1, 1] to latents before quantization `(B, D, t)`, t = N / compression rounded up."""
        if past is not None and self in past:
            raise ValueError(f"a stream ends with the piece that is no multiple of {self.compression} samples")
        sound = self.mixed(signal)
        if missing := -sound.shape[2] % self.compression:
            sound = F.pad(sound, (0, missing))
            if past is not None:
                past[self] = sound.new_empty(0)
        return self.encoder(rearrange(sound, "b c (n p) -> b (c p) n", p=self.patch), past)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """Quantized latents to sound `(B, channels, t * compression)`, not clipped."""
        return rearrange(self.decoder(latents, past), "b (c p) n -> b c (n p)", p=self.patch)

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction `(B, channels, N)`, not clipped, ids, and the quantizer's loss terms."""
        sound, ids, losses = super().forward(signal)
        return sound[:, :, : signal.shape[2]], ids, losses
