"""A transformer that denoises the latents of whole clips.

DiT's blocks (Peebles and Xie, arXiv:2212.09748, section 3.2) over the latents of a video, text by cross-attention as in
PixArt (arXiv:2310.00426), and what is known as further channels, as in W.A.L.T (arXiv:2312.06662).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelm.diffusion.conditions import Conditions
from reelm.diffusion.layers import MLP, Attention, Scalar, Text, turns

LAYOUTS = {"j": "space and time jointly", "s": "each frame", "t": "each place through time"}


def regroup(x: Tensor, layout: str) -> Tensor:
    """Tokens `(B, t, h, w, C)` as rows `(B', L, C)` within which they look at each other."""
    if layout == "s":
        return x.flatten(0, 1).flatten(1, 2)
    if layout == "t":
        return x.permute(0, 2, 3, 1, 4).flatten(0, 2)
    return x.flatten(1, 3)


def ungroup(rows: Tensor, shape: torch.Size, layout: str) -> Tensor:
    """The inverse of `regroup`; shape: `(B, t, h, w, C)`."""
    batch, t, h, w, width = shape
    if layout == "t":
        return rows.view(batch, h, w, t, width).permute(0, 3, 1, 2, 4)
    return rows.view(shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Attention, a look at the text, and a feed-forward layer. The condition shifts and scales what goes in and gates
    what comes out; at the start all gates are shut, so that the block is the identity (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.text_norm, self.look = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))
        for shut in (self.modulation, self.look.out):
            nn.init.zeros_(shut.weight)
            nn.init.zeros_(shut.bias)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x `(B, t, h, w, C)`; condition `(B, t, 1, 1, C)`; angles `(t, h, w, .)`; text `(B, N, C)` and its mask."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(condition)).chunk(6, -1)
        if self.layout == "s":  # positions count by their differences, and those of the other axes are 0 here
            angles = angles[:1]
        elif self.layout == "t":
            angles = angles[:, :1, :1]
        angles = angles.flatten(0, 2)
        rows = regroup(modulate(x, shift, scale), self.layout)
        rows = self.attention(rows, rotation=(angles.cos(), angles.sin()))
        x = x + gate * ungroup(rows, x.shape, self.layout)
        x = x + self.look(self.text_norm(x).flatten(1, 3), text, mask=mask).view(x.shape)
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))


class DiT(nn.Module):
    """Denoises latents of clips of any length and size.

    Args:
        channels: of the latents.
        frames: frames that one of them is made of, which `Conditions.shares` tells one by one.
        pieces: word pieces of the text model; 0 where text comes as vectors. text_width: the size of these.
        width: size of the vectors. heads: of attention.
        layers: a letter for each block: j (attention over space and time jointly), s (each frame by itself) or t (each
            place through time). "stst..." and "ss...tt" are the first two variants of Latte (arXiv:2401.03048).
        mlp_ratio: hidden size of the feed-forward layers over width.
        patch: side in latents of the squares that are one token.
        text_depth: blocks that read the text before the clip's tokens look at it.
        theta: base of the rotary frequencies; about the largest distance that matters.
    """

    cannot_grow = ("channels", "frames", "width", "heads", "patch")  # several matrices lie in one (store.grow)
    checkpointing = False  # whether what is inside of the blocks is computed again in the backward pass, not kept

    def __init__(
        self,
        channels: int,
        frames: int,
        pieces: int = 0,
        text_width: int = 0,
        width: int = 384,
        heads: int = 6,
        layers: str = "jjjjjjjjjjjj",
        mlp_ratio: float = 4.0,
        patch: int = 1,
        text_depth: int = 2,
        theta: float = 100.0,
    ) -> None:
        super().__init__()
        if width % heads or width // heads % 2 or width // heads < 6:
            raise ValueError(f"width {width} must be a multiple of heads {heads}, by an even number of 6 or more")
        if not layers or set(layers) - set(LAYOUTS):
            known = ", ".join(f"{letter} ({what})" for letter, what in LAYOUTS.items())
            raise ValueError(f"layers are a letter for each block, {known}; got {layers!r}")
        if patch < 1:
            raise ValueError(f"patch is 1 or more; got {patch}")
        self.channels, self.frames, self.pieces, self.text_width = channels, frames, pieces, text_width
        self.width, self.heads, self.layers, self.mlp_ratio = width, heads, layers, mlp_ratio
        self.patch, self.text_depth, self.theta = patch, text_depth, theta
        self.enter = nn.Linear((3 * channels + frames) * patch**2, width)  # noisy, known, control; shares
        self.text = Text(width, heads, text_depth, pieces, text_width)
        self.time, self.rate = Scalar(width, 1000.0), Scalar(width, 10.0)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layout) for layout in layers)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch**2)
        for zero in (self.modulation, self.leave):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, noisy: Tensor, time: Tensor, conditions: Conditions = Conditions()) -> Tensor:
        """What the objective asks of the network, `(B, D, t, h, w)`.

        Args:
            noisy: `(B, D, t, h, w)`.
            time: `(B,)`, or `(B, t)` where latent frames are noised unlike; 0: clean, 1: noise.
        """
        tokens = self._patches(noisy, conditions)
        time = time[:, None] if time.ndim == 1 else time
        condition = self.time(time)
        if conditions.fps is not None:
            condition = condition + self.rate(conditions.fps)[:, None]
        condition = condition[:, :, None, None]
        text, mask = self.text(conditions.text, conditions.text_mask, len(noisy))
        x = self.enter(tokens)
        angles = turns(x.shape[1:4], self.width // self.heads, self.theta, x.device)
        for block in self.blocks:
            arguments = (x, condition, angles, text, mask)
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
        out = self.leave(modulate(x, shift, scale)).unflatten(-1, (self.channels, self.patch, self.patch))
        return out.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)  # (B, D, t, h, w)

    def _patches(self, noisy: Tensor, conditions: Conditions) -> Tensor:
        """All that is said of each place, `(B, t, h, w, C)` with h and w in patches."""
        batch, channels, t, h, w = noisy.shape
        if channels != self.channels:
            raise ValueError(f"the denoiser was made for latents of {self.channels} channels; these have {channels}")
        if h % self.patch or w % self.patch:
            raise ValueError(f"latents of {h} x {w} are no whole patches of {self.patch}; take another size or patch")
        parts = [noisy]
        for part, size in (
            (conditions.known, channels),
            (conditions.control, channels),
            (conditions.shares, self.frames),
        ):
            part = noisy.new_zeros(batch, size, t, h, w) if part is None else part.to(noisy.dtype)
            if part.shape != (batch, size, t, h, w):
                raise ValueError(f"what is known is {tuple(part.shape)}; expected {(batch, size, t, h, w)}")
            parts.append(part)
        x = torch.cat(parts, 1).unflatten(4, (-1, self.patch)).unflatten(3, (-1, self.patch))
        return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
