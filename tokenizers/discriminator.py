"""The adversary of the video tokenizer: a 3-D discriminator and its losses (MAGVIT-v2, arXiv:2310.05737, appendix A.2).

The discriminator is StyleGAN's (arXiv:1912.04958) with 3-D convolutions and blur-pooling. Generator and discriminator
are trained in one joint pass: the term for the generator sees the discriminator's weights as constants, the terms for
the discriminator see the reconstruction as a constant, so that their sum has the right gradient for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from reelm.tokenizers.magvit2 import HaarPatch
from reelm.tokenizers.tokenizer import Triple


def blur_pool(x: Tensor, stride: Triple) -> Tensor:
    """Smooths with the binomial kernel (1, 2, 1) / 4 along the axes that are then halved (arXiv:1904.11486).

    `(B, C, T, H, W)`; strides are 1 or 2; a side of n becomes ceil(n / 2). The edge is repeated.
    """
    if any(s not in (1, 2) for s in stride):
        raise ValueError(f"blur-pooling halves sides or keeps them, so strides are 1 or 2; got {tuple(stride)}")
    padding = [p for s in reversed(stride) for p in (s - 1, s - 1)]
    x = F.pad(x, padding, mode="replicate") if any(padding) else x
    return F.avg_pool3d(F.avg_pool3d(x, stride, 1), stride, stride)  # two boxes of 2 make the kernel


class DownBlock(nn.Module):
    """Two convolutions with normalisation and leaky ReLU, a blur-pool between them, and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: Triple, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv3d(cin, cin, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, cin)
        self.conv2 = nn.Conv3d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout)
        self.shortcut = nn.Conv3d(cin, cout, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        h = F.leaky_relu(self.norm2(self.conv2(blur_pool(h, self.stride))), 0.2)
        return (h + self.shortcut(blur_pool(x, self.stride))) * 0.5**0.5


class Discriminator(nn.Module):
    """A video to one score, or to one for each of its parts: high for real ones.

    Args:
        channels: width before each halving, and after the last; the paper has 128 times (2, 4, 4, 4, 4).
        strides: (time, height, width) of each halving, 1 or 2; one fewer than channels.
        groups: of the normalisation.
        head: sides of the feature map that the last two layers read; any size of video is pooled to it. None: every
            place of the feature map has a score of its own (PatchGAN, arXiv:1611.07004), which tells textures apart
            from fewer clips.
        patch: rows and columns of Haar patches in front, powers of two; (4, 4) costs a tenth on a CPU.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 256),
        strides: Sequence[Triple] = ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        groups: int = 8,
        head: Triple | None = (1, 4, 4),
        patch: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        channels, strides = list(channels), [tuple(s) for s in strides]
        if len(strides) != len(channels) - 1:
            raise ValueError(f"{len(channels)} channels ask for {len(channels) - 1} strides; got {len(strides)}")
        self.channels, self.strides, self.groups = channels, strides, groups
        self.head, self.patch = head and tuple(head), tuple(patch)
        self.haar = HaarPatch((1, *self.patch))
        self.first = nn.Conv3d(3 * self.patch[0] * self.patch[1], channels[0], 3, padding=1)
        self.blocks = nn.Sequential(
            *(DownBlock(a, b, s, groups) for a, b, s in zip(channels, channels[1:], strides, strict=False))
        )
        top = channels[-1]
        self.last = nn.Conv3d(top, top, 3, padding=1)
        if self.head is None:
            self.score = nn.Conv3d(top, 1, 1)
        else:
            places = self.head[0] * self.head[1] * self.head[2]
            self.score = nn.Sequential(
                nn.AdaptiveAvgPool3d(self.head), nn.Flatten(),
                nn.Linear(top * places, top), nn.LeakyReLU(0.2), nn.Linear(top, 1),
            )  # fmt: skip
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, video: Tensor) -> Tensor:
        """`(B, 3, T, H, W)` to `(B, places)`; one place with a head."""
        h = self.haar(video).contiguous(memory_format=torch.channels_last_3d)
        h = self.blocks(F.leaky_relu(self.first(h), 0.2))
        return self.score(F.leaky_relu(self.last(h), 0.2)).flatten(1)


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """What the generator minimises, of the scores, of any shape, of its videos."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the discriminator minimises, of scores of any shape: hinge (arXiv:1705.02894) or the logistic loss whose
    generator side is non-saturating (arXiv:1406.2661)."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """R1 (arXiv:1801.04406): half the squared norm of the mean score's gradient at real videos. In float32, with which
    alone a second derivative is safe."""
    with torch.autocast(real.device.type, enabled=False):
        real = real.detach().float().requires_grad_()
        (slope,) = torch.autograd.grad(
            discriminator(real).reshape(len(real), -1).mean(1).sum(), real, create_graph=True
        )
    return 0.5 * slope.square().flatten(1).sum(1).mean()


class Adversary(nn.Module):
    """The adversarial terms of a tokenizer's loss.

    Args:
        discriminator: from videos to scores.
        kind: "non_saturating" or "hinge".
        weight: of the generator's term.
        r1: weight of the gradient penalty; every: batches between penalties, each of which counts as many times
            (arXiv:1912.04958, section 4.1).
        lecam: weight of the regularisation towards the moving averages of scores (arXiv:2104.03310); decay: theirs.
        start: batches before the generator listens; the discriminator learns from the first one on.
        frames: of a random part of each batch's clips that is looked at, to save time; None: all.
        lr: learning rate of the discriminator at its peak.
    """

    real_mean: Tensor
    fake_mean: Tensor
    steps: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        kind: Literal["non_saturating", "hinge"] = "non_saturating",
        weight: float = 0.1,
        r1: float = 10.0,
        every: int = 16,
        lecam: float = 0.001,
        decay: float = 0.999,
        start: int = 0,
        lr: float = 1e-4,
        frames: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("non_saturating", "hinge"):
            raise ValueError(f"kind is non_saturating or hinge; got {kind}")
        if every < 1:
            raise ValueError(f"every is at least 1; got {every}")
        self.discriminator, self.kind, self.weight, self.r1, self.every = discriminator, kind, weight, r1, every
        self.lecam, self.decay, self.start, self.lr, self.frames = lecam, decay, start, lr, frames
        for name in ("real_mean", "fake_mean"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of training; kept for exact resume

    def forward(self, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, with gradients for the generator and the discriminator, and each by name.

        fake: reconstructions `(B, 3, T, H, W)`; real: the videos themselves.
        """
        if self.frames is not None and self.frames < real.shape[2]:
            first = int(torch.randint(real.shape[2] - self.frames + 1, ()))
            fake, real = (video[:, :, first : first + self.frames] for video in (fake, real))
        constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        listens = float(self.steps >= self.start)
        terms = {
            "adversarial": listens * generator_loss(functional_call(self.discriminator, constants, fake), self.kind)
        }
        real_score, fake_score = self.discriminator(real), self.discriminator(fake.detach())
        real_score, fake_score = real_score.float(), fake_score.float()
        terms["discriminator"] = discriminator_loss(real_score, fake_score, self.kind)
        total = self.weight * terms["adversarial"] + terms["discriminator"]
        if self.lecam:
            high, low = real_score.mean() - self.fake_mean, self.real_mean - fake_score.mean()
            terms["lecam"] = F.relu(high).square() + F.relu(low).square()
            total = total + self.lecam * terms["lecam"]
        if self.training:
            if self.r1 and self.steps % self.every == 0:
                terms["r1"] = gradient_penalty(self.discriminator, real)
                total = total + self.r1 * self.every * terms["r1"]
            with torch.no_grad():
                self.real_mean.lerp_(real_score.mean(), 1 - self.decay)
                self.fake_mean.lerp_(fake_score.mean(), 1 - self.decay)
                self.steps += 1
        terms["real_score"], terms["fake_score"] = real_score.mean(), fake_score.mean()
        return total, {name: value.detach() for name, value in terms.items()}
