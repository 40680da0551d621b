"""The strictly causal 3-D CNN tokenizer of MAGVIT-v2 (https://arxiv.org/abs/2310.05737, section 3.2).

Frame 0 depends on itself alone, latent frame k on pixel frames 0 .. k * temporal compression and no later one, so an
image is a clip of one frame and the tokens of a prefix are the prefix of the tokens. Unlike public reproductions no
normalisation looks at another frame. An optional Haar patch transform in front (as in Cosmos) makes the network
several times cheaper; `patch=(1, 1, 1)` is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.tokenizers.convolution import Conv3d, channels_last, clips_of, frames_of
from reelm.tokenizers.tokenizer import Past, Triple, VideoTokenizer, begins


def haar_basis(size: int) -> Tensor:
    """Orthonormal 1-D Haar basis, rows from coarse to fine: `(size, size)`; size is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"the sides of a Haar patch are powers of two; got {size}")
    basis = torch.ones(1, 1)
    while len(basis) < size:
        coarse = torch.kron(basis, torch.tensor([[1.0, 1.0]]))
        fine = torch.kron(torch.eye(len(basis)), torch.tensor([[1.0, -1.0]]))
        basis = torch.cat([coarse, fine]) / math.sqrt(2)
    return basis


class HaarPatch(nn.Module):
    """Pixels to Haar coefficients of `(pt, ph, pw)` patches and back, exactly invertible.

    In time the first frame is repeated to fill the first patch, so `1 + pt * k` frames give `1 + k`; `inverse` drops
    the repeats. Later pieces of a stream have no such frame.
    """

    def __init__(self, patch: Triple) -> None:
        super().__init__()
        self.patch = patch
        t, h, w = (haar_basis(p) for p in patch)
        self.register_buffer("basis", torch.kron(t, torch.kron(h, w)), persistent=False)

    def forward(self, video: Tensor, past: Past | None = None) -> Tensor:
        """`(B, 3, T, H, W)` to `(B, 3 * patch volume, T', H', W')`."""
        pt, ph, pw = self.patch
        if self.patch == (1, 1, 1):
            return video
        if begins(self, past, video):
            video = torch.cat([video[:, :, :1]] * (pt - 1) + [video], dim=2)
        patches = rearrange(video, "b c (t pt) (h ph) (w pw) -> b t h w c (pt ph pw)", pt=pt, ph=ph, pw=pw)
        with torch.autocast(video.device.type, enabled=False):  # small differences of large pixels
            return rearrange(patches @ self.basis.T.to(patches), "b t h w c p -> b (c p) t h w")

    def inverse(self, x: Tensor, past: Past | None = None) -> Tensor:
        pt, ph, pw = self.patch
        if self.patch == (1, 1, 1):
            return x
        first = begins(self, past, x)
        with torch.autocast(x.device.type, enabled=False):  # matrices so small are slower in bfloat16
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            patches = rearrange(x, "b (c p) t h w -> b t h w c p", c=3) @ self.basis.to(x)
        video = rearrange(patches, "b t h w c (pt ph pw) -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)
        return video[:, :, pt - 1 :] if first else video


class CausalConv3d(Conv3d):
    """3-D convolution that sees no later frame: time is padded in front only, by repeating the first frame.

    In a stream, a later piece is padded with the last frames of the piece before it.
    """

    def __init__(self, cin: int, cout: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = True) -> None:
        super().__init__(cin, cout, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        front = self.kernel_size[0] - 1
        before = None if past is None else past.get(self)
        if front:
            pieces = [x[:, :, :1]] * front + [x] if before is None else [before, x]
            x = torch.cat([piece.movedim(1, -1) for piece in pieces], 1).movedim(-1, 1)  # so channels stay last
        if past is not None:
            past[self] = x[:, :, x.shape[2] - front :].clone()  # a view would keep the whole piece
        if before is not None:  # the next place is a whole stride after the last one, which was the piece's last frame
            x = x[:, :, self.stride[0] - 1 :]
        return super().forward(x)

    def inflate(self, weights: dict[str, Tensor], name: str, small: CausalConv3d) -> None:
        """Puts the stored kernel of an image, or of less time, into the last slices in time, those of the frame itself
        (MAGVIT-v2, appendix A.2); what is before them begins with no say."""
        earlier = self.kernel_size[0] - small.kernel_size[0]
        if earlier > 0:
            weights[f"{name}.weight"] = F.pad(weights[f"{name}.weight"], (0, 0, 0, 0, earlier, 0))


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself (a norm over time would let later frames speak to earlier ones)."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return clips_of(super().forward(frames_of(x)), len(x))


class SiteNorm(nn.LayerNorm):
    """Normalisation of each place by itself, so that what happens elsewhere in the frame leaves it as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {"frame": FrameNorm, "site": SiteNorm}


class AdaptiveNorm(FrameNorm):
    """Group normalisation whose gain and bias at each place come from the latents there (MAGVIT-v2, section 3.2).

    Statistics are each frame's own and a frame is told of no later latent frame, so that the decoder stays causal.

    Args:
        channels: of the features. dim: of the latents.
        stretch: (time, height, width) of a latent, in frames and places of the features.
    """

    def __init__(self, channels: int, dim: int, stretch: Triple) -> None:
        super().__init__(channels)
        self.stretch = stretch
        self.style = Conv3d(dim, 2 * channels, 1)
        nn.init.zeros_(self.style.weight)
        nn.init.zeros_(self.style.bias)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        style = self.style(latents)
        for axis, times in zip((2, 3, 4), self.stretch, strict=True):
            style = style.repeat_interleave(times, axis)
        gain, bias = style[:, :, style.shape[2] - x.shape[2] :].chunk(2, 1)  # the first latent is of one frame only
        return super().forward(x) * (1 + gain) + bias


def swish(x: Tensor) -> Tensor:
    """SiLU of what nobody else holds: in its place, where no gradient will ask for it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Pre-activation residual block: norm, swish, conv, twice; 1x1x1 shortcut when the width changes."""

    def __init__(self, cin: int, cout: int, kernel: Triple, norm: type[nn.Module] = FrameNorm) -> None:
        super().__init__()
        self.norm1 = norm(cin)
        self.conv1 = CausalConv3d(cin, cout, kernel, bias=False)
        self.norm2 = norm(cout)
        self.conv2 = CausalConv3d(cout, cout, kernel, bias=False)
        self.shortcut = Conv3d(cin, cout, 1, bias=False) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv1(swish(self.norm1(x)), past)
        return self.shortcut(x) + self.conv2(swish(self.norm2(h)), past)

    def begin_as_identity(self) -> None:
        """Makes a block that deepens a trained network leave it as it is, to begin with."""
        nn.init.zeros_(self.conv2.weight)


class Upsample(nn.Module):
    """Depth to space (and time); the first `stride_t - 1` frames are dropped, mirroring the causal down-sampling."""

    def __init__(self, cin: int, cout: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(cin, cout * math.prod(stride), kernel)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        st, sh, sw = self.stride
        first = begins(self, past, x)
        x = self.conv(x, past).movedim(1, -1)  # one copy, with channels last
        x = rearrange(x, "b t h w (c st sh sw) -> b (t st) (h sh) (w sw) c", st=st, sh=sh, sw=sw).movedim(-1, 1)
        return x[:, :, st - 1 :] if first else x

    def inflate(self, weights: dict[str, Tensor], name: str, small: Upsample) -> None:
        """Where frames are made of one that the stored network made, they begin as copies of it."""
        st, sh, sw = self.stride
        if small.stride == (1, sh, sw):
            for key in (f"{name}.conv.weight", f"{name}.conv.bias"):
                rows = weights[key].unflatten(0, (-1, 1, sh * sw))
                weights[key] = rows.repeat_interleave(st, 1).flatten(0, 2)


class Causal(nn.Sequential):
    """Parts in a row, some of which remember the past and some of which are told the latents."""

    def forward(self, x: Tensor, past: Past | None = None, latents: Tensor | None = None) -> Tensor:
        for part in self:
            if isinstance(part, (CausalConv3d, ResBlock, Upsample)):
                x = part(x, past)
            else:
                x = part(x, latents) if isinstance(part, AdaptiveNorm) else part(x)
        return x

    def reach(self, scale: tuple[float, float]) -> tuple[float, float]:
        """How far the parts together look to each side in rows and columns, of which a place at first counts `scale`,
        norms over whole frames aside."""
        reach, scale = [0.0, 0.0], list(scale)
        for part in self:
            for conv in part.modules():
                for axis in (0, 1) if isinstance(conv, CausalConv3d) else ():
                    reach[axis] += conv.kernel_size[1 + axis] // 2 * scale[axis]
                    scale[axis] *= conv.stride[1 + axis]
            if isinstance(part, Upsample):
                scale = [one / times for one, times in zip(scale, part.stride[1:])]
        return tuple(reach)


class MAGVIT2(VideoTokenizer):
    """Causal video tokenizer.

    Args:
        quantizer: an object of `reelm.tokenizers.quantizers`.
        channels: width of each resolution level, finest first.
        strides: (time, height, width) down-sampling between consecutive levels, one fewer than levels.
        blocks: residual blocks at each level.
        kernels: convolution kernel (time, height, width) at each level.
        patch: size of the Haar patches in front; (1, 1, 1) for none.
        encoder_blocks, encoder_kernels: those of the encoder, where they differ. An encoder that sees little around a
            token gives what stands still the same token again and again, which a language model learns much faster.
        encoder_norm: "frame" or, so that no place depends on the rest of the frame, "site".
        adaptive: a norm told by the latents before the decoder's blocks of each level, as in the paper.
        decoder_norm: as `encoder_norm`; with "site" in both, tiles of large frames fit without a trace of seams.
    """

    cannot_grow = ("patch",)
    # parts and arguments on which no token depends
    decoding_only = ("decoder", "blocks", "kernels", "adaptive", "decoder_norm")

    def __init__(
        self,
        quantizer: nn.Module,
        channels: Sequence[int] = (128, 256, 256, 512),
        strides: Sequence[Triple] = ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        blocks: Sequence[int] = (4, 4, 4, 4),
        kernels: Sequence[Triple] = ((3, 3, 3),) * 4,
        patch: Triple = (1, 1, 1),
        encoder_blocks: Sequence[int] | None = None,
        encoder_kernels: Sequence[Triple] | None = None,
        encoder_norm: Literal["frame", "site"] = "frame",
        adaptive: bool = False,
        decoder_norm: Literal["frame", "site"] = "frame",
    ) -> None:
        super().__init__()
        for name, kind in (("encoder_norm", encoder_norm), ("decoder_norm", decoder_norm)):
            if kind not in NORMS:
                raise ValueError(f"{name} is one of {', '.join(NORMS)}; got {kind}")
        if adaptive and decoder_norm != "frame":
            raise ValueError(f"adaptive=true has norms of whole frames; decoder_norm={decoder_norm} asks for false")
        norm, back = NORMS[encoder_norm], NORMS[decoder_norm]
        encoder_blocks = list(encoder_blocks or blocks)
        encoder_kernels = [tuple(kernel) for kernel in encoder_kernels or kernels]
        channels, strides, blocks, kernels = (list(x) for x in (channels, strides, blocks, kernels))
        levels = (channels, blocks, kernels, encoder_blocks, encoder_kernels)
        lengths = {len(strides) + 1, *(len(level) for level in levels)}
        if len(lengths) > 1:
            raise ValueError(
                f"{len(channels)} channels ask for {len(channels) - 1} strides, {len(channels)} blocks and kernels; "
                f"got {len(strides)}, {len(blocks)} and {len(kernels)}"
            )
        strides, kernels = [tuple(s) for s in strides], [tuple(k) for k in kernels]
        self.channels, self.strides, self.blocks, self.kernels = channels, strides, blocks, kernels
        self.encoder_blocks, self.encoder_kernels, self.encoder_norm = encoder_blocks, encoder_kernels, encoder_norm
        self.patch, self.adaptive, self.decoder_norm = tuple(patch), adaptive, decoder_norm
        self.quantizer = quantizer
        self.haar = HaarPatch(self.patch)
        self.compression: Triple = tuple(p * math.prod(s[i] for s in strides) for i, p in enumerate(patch))
        pixels = 3 * math.prod(patch)
        top = channels[-1]

        # named, so that a deeper network can begin with the weights of a shallower one
        encoder = self.encoder = Causal()
        encoder.add_module("first", CausalConv3d(pixels, channels[0], encoder_kernels[0], bias=False))
        width = channels[0]
        for level, (cout, count, kernel) in enumerate(zip(channels, encoder_blocks, encoder_kernels)):
            for block in range(count):
                encoder.add_module(f"level{level}_block{block}", ResBlock(width, cout, kernel, norm))
                width = cout
            if level < len(strides):
                down = tuple(max(k, 2 if s > 1 else 1) if s > 1 else k for k, s in zip(kernel, strides[level]))
                encoder.add_module(f"level{level}_down", CausalConv3d(width, width, down, strides[level]))
        encoder.add_module("norm", norm(top))
        encoder.add_module("act", nn.SiLU())
        encoder.add_module("last", Conv3d(top, quantizer.inputs, 1))

        decoder = self.decoder = Causal()
        decoder.add_module("first", CausalConv3d(quantizer.dim, top, kernels[-1]))
        width = top
        for level in reversed(range(len(channels))):
            if adaptive:
                stretch = tuple(math.prod(s[axis] for s in strides[level:]) for axis in range(3))
                decoder.add_module(f"level{level}_style", AdaptiveNorm(width, quantizer.dim, stretch))
            for block in range(blocks[level]):
                decoder.add_module(f"level{level}_block{block}", ResBlock(width, channels[level], kernels[level], back))
                width = channels[level]
            if level:
                up = Upsample(width, channels[level - 1], kernels[level - 1], strides[level - 1])
                decoder.add_module(f"level{level}_up", up)
                width = channels[level - 1]
        decoder.add_module("norm", back(width))
        decoder.add_module("act", nn.SiLU())
        decoder.add_module("last", CausalConv3d(width, pixels, kernels[0]))
        self.to(memory_format=torch.channels_last_3d)

    def reach(self) -> tuple[tuple[int, int], tuple[int, int]]:
        sides = self.compression[1:]
        seen = self.encoder.reach(self.patch[1:]), self.decoder.reach(sides)
        return tuple(tuple(math.ceil(pixels / side) for pixels, side in zip(part, sides)) for part in seen)

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        self.check(video, past)
        return self.encoder(channels_last(self.haar(video, past)), past)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        latents = channels_last(latents)
        return self.haar.inverse(self.decoder(latents, past, latents), past)
