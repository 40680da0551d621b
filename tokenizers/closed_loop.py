"""A video tokenizer whose encoder knows what its decoder already shows.

The encoders of MAGVIT-v2 and its kin describe each latent frame anew, so what stands still is told again and again,
always with the same error. Here, as in video codecs and their learned successors (DVC, arXiv:1812.00101; DCVC,
arXiv:2109.15047), the encoder runs the decoder along and describes what is still missing: what stands still becomes
finer with each latent frame, and what moves is carried along by motion that the decoder finds in the codes. Unlike
those it spends the same number of bits, one code, on every place, and has no entropy coder.

It is strictly causal. Latent frame k is made of pixel frames 0 .. 4k and of what the decoder made of the latent frames
before; each side remembers nothing but the last frames and one map of features.

At the same bits it is nearer to the clip than a tokenizer that describes anew. Its codes tell changes, which makes them
harder to predict for a language model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.tokenizers.magvit2 import SiteNorm, haar_basis
from reelm.tokenizers.tokenizer import Past, Triple, VideoTokenizer

Memory = tuple[Tensor, Tensor]  # the last group of frames, as Haar coefficients, and the decoder's features


class Block(nn.Module):
    """Residual block: norm, 3 x 3 convolution, swish, 1 x 1 convolution. The norm sees one place at a time, so that
    crops, whole frames and tiles are alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = SiteNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.conv(self.norm(x))))

    def begin_as_identity(self) -> None:
        """Makes a block that deepens a trained network leave it as it is, to begin with."""
        nn.init.zeros_(self.mix.weight)


def network(cin: int, width: int, blocks: int) -> nn.Sequential:
    """A linear map at each place, and blocks."""
    return nn.Sequential(nn.Conv2d(cin, width, 1), *(Block(width) for _ in range(blocks)))


def warp(frame: Tensor, flow: Tensor) -> Tensor:
    """What a frame `(B, C, H, W)` has at `flow` `(B, 2, H, W)` pixels (across, down) from each place.

    Bilinear; beyond the edge is the edge.
    """
    height, width = frame.shape[2:]
    across = torch.arange(width, device=flow.device) + flow[:, 0]
    down = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], -1)
    return F.grid_sample(frame, grid, padding_mode="border", align_corners=False)


class ClosedLoop(VideoTokenizer):
    """Causal video tokenizer with the decoder in the encoder's loop.

    Args:
        quantizer: an object of `reelm.tokenizers.quantizers`.
        patch: (frames, rows, columns) of the Haar transform, powers of two; also the compression.
        width: channels of the networks, which all work at one place a patch.
        encoder_blocks: of the network from what is and what is shown to a latent.
        motion_blocks: of the decoder's network that finds the motion, two vectors a side of each patch.
        decoder_blocks: of its network that corrects what the motion carried along.
    """

    FASTEST = 4.0  # pixels a group of frames; the scale of motion, not its limit

    def __init__(
        self,
        quantizer: nn.Module,
        patch: Triple = (4, 8, 8),
        width: int = 256,
        encoder_blocks: int = 3,
        motion_blocks: int = 2,
        decoder_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.quantizer, self.patch, self.width = quantizer, tuple(patch), width
        self.encoder_blocks, self.motion_blocks, self.decoder_blocks = encoder_blocks, motion_blocks, decoder_blocks
        self.compression: Triple = self.patch
        time, rows, columns = (haar_basis(side) for side in self.patch)
        self.register_buffer("basis", torch.kron(time, torch.kron(rows, columns)), persistent=False)
        coefficients = 3 * len(self.basis)
        self.begin = nn.Parameter(torch.zeros(width))
        self.encoder = network(2 * coefficients + width, width, encoder_blocks)
        self.to_latent = nn.Conv2d(width, quantizer.inputs, 1)
        self.mover = network(quantizer.dim + coefficients + width, width, motion_blocks)
        self.to_flow = nn.Conv2d(width, 8, 1)
        self.see = nn.Conv2d(coefficients, width, 1)
        self.corrector = nn.Sequential(*(Block(width) for _ in range(decoder_blocks)))
        self.to_coefficients = nn.Conv2d(width, coefficients, 1)
        nn.init.zeros_(self.to_flow.weight)
        nn.init.zeros_(self.to_flow.bias)
        self.to(memory_format=torch.channels_last)

    def _analysed(self, frames: Tensor) -> Tensor:
        """Pixels `(B, 3, t * pt, H, W)` to coefficients `(t, B, 3 * patch volume, h, w)`."""
        pt, ph, pw = self.patch
        patches = rearrange(frames, "b c (t pt) (h ph) (w pw) -> t b h w c (pt ph pw)", pt=pt, ph=ph, pw=pw)
        with torch.autocast(frames.device.type, enabled=False):
            return (patches.float() @ self.basis.T).flatten(-2).permute(0, 1, 4, 2, 3)

    def _synthesised(self, coefficients: Tensor) -> Tensor:
        """One latent frame's coefficients `(B, 3 * patch volume, h, w)` to pixels `(B, 3, pt, H, W)`."""
        pt, ph, pw = self.patch
        patches = rearrange(coefficients, "b (c p) h w -> b h w c p", c=3)
        with torch.autocast(coefficients.device.type, enabled=False):
            patches = patches.float() @ self.basis
        return rearrange(patches, "b h w c (pt ph pw) -> b c pt (h ph) (w pw)", pt=pt, ph=ph, pw=pw)

    def _beginning(self, like: Tensor, past: Past | None) -> tuple[bool, Memory]:
        """Whether a clip begins, and what is remembered; `like` is of its shape `(B, ..., h, w)`."""
        if past:
            return False, (past[self], past[self.corrector])
        batch, height, width = len(like), *like.shape[-2:]
        grey = self.begin.new_zeros(batch, 3 * len(self.basis), height, width)
        return True, (grey, self.begin.view(1, -1, 1, 1).expand(batch, -1, height, width))

    def _advance(self, quantized: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The decoder: pixels `(B, 3, pt, H, W)` of the next latent frame `(B, D, h, w)`, not clipped, and what is
        remembered of them."""
        known, features = memory
        features = self.mover(torch.cat([quantized.to(known), known, features.to(known)], 1))
        last = self._synthesised(known)[:, :, -1]
        flow = F.pixel_shuffle(self.to_flow(features).float() * self.FASTEST, 2)
        flow = F.interpolate(flow, size=last.shape[2:], mode="bilinear")
        time = self.patch[0]
        moved = torch.stack([warp(last, flow * (frame / time)) for frame in range(1, time + 1)], 2)
        moved = self._analysed(moved)[0]
        features = self.corrector(features + self.see(moved))
        pixels = self._synthesised(moved + self.to_coefficients(features).float())
        return pixels, (self._analysed(pixels.clamp(-1, 1))[0], features)

    def _latent(self, coefficients: Tensor, memory: Memory) -> Tensor:
        """The encoder: the next latent frame `(B, D, h, w)` of coefficients, before quantization."""
        known, features = memory
        last = self._synthesised(known)[:, :, -1:]
        still = self._analysed(last.expand(-1, -1, self.patch[0], -1, -1))[0]
        return self.to_latent(self.encoder(torch.cat([coefficients - still, known, features.to(known)], 1)))

    def _loop(self, video: Tensor, past: Past | None) -> Iterator[tuple[Tensor, ...]]:
        """For each latent frame: the latents before quantization, what the quantizer answers, and the pixels."""
        self.check(video, past)
        first = not past
        if first:
            video = torch.cat([video[:, :, :1]] * (self.patch[0] - 1) + [video], 2)
        groups = self._analysed(video)
        _, memory = self._beginning(groups[0], past)
        for coefficients in groups:
            latents = self._latent(coefficients, memory).unsqueeze(2)
            quantized, ids, losses = self.quantizer(latents)
            pixels, memory = self._advance(quantized.squeeze(2), memory)
            yield latents, quantized, ids, losses, pixels[:, :, -1:] if first else pixels
            first = False
        if past is not None:
            past[self], past[self.corrector] = memory

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        return torch.cat([latents for latents, *_ in self._loop(video, past)], 2)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        first, memory = self._beginning(latents[:, :, 0], past)
        frames = []
        for quantized in latents.unbind(2):
            pixels, memory = self._advance(quantized, memory)
            frames.append(pixels[:, :, -1:] if first else pixels)
            first = False
        if past is not None:
            past[self], past[self.corrector] = memory
        return torch.cat(frames, 2)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        _, _, ids, losses, pixels = zip(*self._loop(video, None))
        mean = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        return torch.cat(pixels, 2), torch.cat(ids, 1), mean
