"""Tokenizers of transformers: C-ViViT of Phenaki (https://arxiv.org/abs/2210.02399, section 2.1) and ST-ViViT of Genie
(https://arxiv.org/abs/2402.15391, section 2.1).

Both have layers that attend within a frame and layers that attend, at one place, to earlier frames. C-ViViT has the
former first and the latter last, and the mirror image in its decoder; ST-ViViT lets them take turns. Attention in time
looks back over a window, so that streams of any length run in constant memory; with a window as long as the clips of
training it is the papers'.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.tokenizers.tokenizer import Past, Triple, VideoTokenizer, begins


class Layer(nn.Module):
    """Pre-norm attention and a feed-forward network of four times the width over `(B, T, h, w, width)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b t h w (n heads d) -> n b t h w heads d", n=3, heads=self.heads)
        x = x + self.out(self.attend(q, k, v, past).flatten(-2))
        return x + self.mlp(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Past | None) -> Tensor:
        """Values `(B, T, h, w, heads, d)` gathered for queries of the same shape."""
        raise NotImplementedError


class Spatial(Layer):
    """Attention within each frame, with rotary positions over rows and columns."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Past | None) -> Tensor:
        height, width, dim = q.shape[2], q.shape[3], q.shape[-1]
        speeds = 100.0 ** -(torch.arange(dim // 4, device=q.device) / (dim // 4))
        rows, columns = (torch.arange(n, device=q.device)[:, None] * speeds for n in (height, width))
        angles = torch.cat(
            [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1
        )  # (h, w, dim / 2)
        cos, sin = angles.cos()[..., None, :].to(q), angles.sin()[..., None, :].to(q)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        parts = (rearrange(part, "b t h w heads d -> (b t) heads (h w) d") for part in (turn(q), turn(k), v))
        y = F.scaled_dot_product_attention(*parts)
        return rearrange(y, "(b t) heads (h w) d -> b t h w heads d", b=len(q), h=height)


class Temporal(Layer):
    """Attention at each place to its own last `window` frames, with a learned bias for each distance, which begins as
    ALiBi's (https://arxiv.org/abs/2108.12409)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, heads)
        self.window = window
        slopes = 2.0 ** (-8 * (torch.arange(heads) + 1) / heads)
        self.bias = nn.Parameter(slopes[:, None] * torch.arange(1 - window, 1))  # (heads, window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Past | None) -> Tensor:
        kv = torch.stack([k, v])  # (2, B, T, h, w, heads, d)
        if past is not None and self in past:
            kv = torch.cat([past[self], kv], 2)
        if past is not None:
            past[self] = kv[:, :, max(kv.shape[2] - self.window + 1, 0) :].clone()
        frames, known = q.shape[1], kv.shape[2] - q.shape[1]
        missing = self.window - 1 - known  # frames before the clip began
        kv = F.pad(kv, (0, 0) * 4 + (missing, 0)).unfold(2, self.window, 1)  # (2, B, T, h, w, heads, d, window)
        # each query has a window of its own, so that its sums do not depend on how many others there are
        k, v = rearrange(kv, "n b t h w heads d l -> n (b t h w) heads l d")
        place = torch.arange(frames, device=q.device)[:, None] + torch.arange(self.window, device=q.device)
        bias = torch.where(place[:, None] >= missing, self.bias, -torch.inf)  # (T, heads, window)
        bias = bias[None, :, None, None].expand(len(q), -1, *q.shape[2:4], -1, -1).flatten(0, 3)
        y = F.scaled_dot_product_attention(q.flatten(0, 3)[:, :, None], k, v, attn_mask=bias[:, :, None].to(q))
        return y.view_as(q)


class Layers(nn.Module):
    """Spatial and temporal layers in the order of their letters, with a norm behind them."""

    def __init__(self, order: str, width: int, heads: int, window: int) -> None:
        kinds = {"s": lambda: Spatial(width, heads), "t": lambda: Temporal(width, heads, window)}
        if not order or set(order) - set(kinds):
            raise ValueError(f"layers are a word of the letters s (spatial) and t (temporal); got {order!r}")
        super().__init__()
        self.stack, self.norm = nn.ModuleList(kinds[letter]() for letter in order), nn.LayerNorm(width)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for layer in self.stack:
            x = layer(x, past)
        return self.norm(x)


class Encoder(nn.Module):
    """Pixels `(B, 3, T, H, W)` to latents `(B, dim, t, h, w)`."""

    def __init__(self, patch: Triple, layers: Layers, width: int, dim: int) -> None:
        super().__init__()
        self.patch, volume = patch, 3 * patch[1] * patch[2]
        self.first, self.later = nn.Linear(volume, width), nn.Linear(patch[0] * volume, width)
        self.layers, self.last = layers, nn.Linear(width, dim)

    def forward(self, video: Tensor, past: Past | None = None) -> Tensor:
        _, ph, pw = self.patch
        parts = []
        if begins(self, past, video):
            image, video = video[:, :, :1], video[:, :, 1:]
            parts.append(self.first(rearrange(image, "b c t (h ph) (w pw) -> b t h w (c ph pw)", ph=ph, pw=pw)))
        if video.shape[2]:
            how = "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)"
            parts.append(self.later(rearrange(video, how, pt=self.patch[0], ph=ph, pw=pw)))
        return self.last(self.layers(torch.cat(parts, 1), past)).movedim(-1, 1)


class Decoder(nn.Module):
    """Latents `(B, dim, t, h, w)` to pixels `(B, 3, T, H, W)`, linear at the end as in the paper."""

    def __init__(self, patch: Triple, layers: Layers, width: int, dim: int) -> None:
        super().__init__()
        self.patch, volume = patch, 3 * patch[1] * patch[2]
        self.begin, self.layers = nn.Linear(dim, width), layers
        self.first, self.later = nn.Linear(width, volume), nn.Linear(width, patch[0] * volume)

    def forward(self, latents: Tensor, past: Past | None = None) -> Tensor:
        _, ph, pw = self.patch
        x = self.layers(self.begin(latents.movedim(1, -1)), past)
        parts = []
        if begins(self, past, latents):
            image, x = x[:, :1], x[:, 1:]
            parts.append(rearrange(self.first(image), "b t h w (c ph pw) -> b c t (h ph) (w pw)", ph=ph, pw=pw))
        if x.shape[1]:
            how = "b t h w (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
            parts.append(rearrange(self.later(x), how, pt=self.patch[0], ph=ph, pw=pw))
        return torch.cat(parts, 2)


class ViViT(VideoTokenizer):
    """Causal video tokenizer of transformer layers.

    Args:
        quantizer: an object of `reelm.tokenizers.quantizers`.
        patch: frames (the first frame of a clip is a patch by itself), rows and columns of a token.
        width, heads: of the layers; a head's dimension is a multiple of 4.
        layers: of the encoder, "s" for spatial and "t" for temporal: "sssstttt" is Phenaki's, "stststst" Genie's.
        decoder_layers: of the decoder; None: those of the encoder from last to first.
        window: latent frames that attention in time looks back over, its own among them.
    """

    cannot_grow = ("patch", "width", "heads", "layers", "decoder_layers", "window")
    decoding_only = ("decoder", "decoder_layers")  # parts and arguments on which no token depends

    def __init__(
        self,
        quantizer: nn.Module,
        patch: Triple = (2, 8, 8),
        width: int = 512,
        heads: int = 8,
        layers: str = "sssstttt",
        decoder_layers: str | None = None,
        window: int = 8,
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of four times the {heads} heads")
        if window < 1:
            raise ValueError(f"window={window}: attention in time sees at least its own frame; set 1 or more")
        self.quantizer, self.patch, self.compression = quantizer, tuple(patch), tuple(patch)
        self.width, self.heads, self.layers, self.window = width, heads, layers, window
        self.decoder_layers = decoder_layers or layers[::-1]
        self.encoder, self.decoder = (
            kind(self.patch, Layers(order, width, heads, window), width, dim)
            for kind, order, dim in ((Encoder, layers, quantizer.inputs), (Decoder, self.decoder_layers, quantizer.dim))
        )

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        self.check(video, past)
        return self.encoder(video, past)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        return self.decoder(latents, past)
