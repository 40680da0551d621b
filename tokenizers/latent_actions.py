"""Genie's latent action model: which of a few things happens between two frames, learned from clips alone
(arXiv:2402.15391, section 2.1)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from reelm.tokenizers.quantizers import VQ
from reelm.tokenizers.vivit import Layers


class LatentActions(nn.Module):
    """Names what happens from frame to frame by one of a few codes, with which the next frame can be told.

    The encoder sees frames 1 to t + 1 and names action t; the decoder sees frames 1 to t and the actions up to t, and
    predicts frame t + 1. So a code holds what cannot be foreseen. Layers within frames and layers that look back in
    time are those of ST-ViViT (vivit.py).

    Args:
        codes: number of actions. dim: of their vectors.
        patch: side of the squares in which pixels are read and predicted.
        width, heads: of the layers; a head's dimension is a multiple of 4.
        layers: of the encoder, "s" within frames and "t" along time. decoder_layers: None: the same.
        window: frames that attention in time looks back over, its own among them.
        stride: an action leads over so many frames: those that a video tokenizer puts into one latent frame.
        decay: of the running means that codes are. dead: codes used less than this are replaced.
    """

    def __init__(
        self,
        codes: int = 8,
        dim: int = 32,
        patch: int = 16,
        width: int = 512,
        heads: int = 8,
        layers: str = "stststst",
        decoder_layers: str | None = None,
        window: int = 16,
        stride: int = 1,
        decay: float = 0.99,
        dead: float = 0.1,
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of four times the {heads} heads")
        if patch < 1 or stride < 1 or window < 2:
            raise ValueError(f"patch and stride are 1 or more, window 2 or more; got {patch}, {stride} and {window}")
        self.codes, self.dim, self.patch, self.width, self.heads = codes, dim, patch, width, heads
        self.layers, self.decoder_layers, self.window, self.stride = layers, decoder_layers or layers, window, stride
        self.decay, self.dead = decay, dead
        pixels = 3 * patch * patch
        self.enter, self.encoder = nn.Linear(pixels, width), Layers(layers, width, heads, window)
        self.name, self.quantizer = nn.Linear(width, dim), VQ(codes, dim, decay=decay, dead=dead)
        self.begin, self.told = nn.Linear(pixels, width), nn.Linear(dim, width)
        self.decoder, self.leave = Layers(self.decoder_layers, width, heads, window), nn.Linear(width, pixels)

    @property
    def vocabulary(self) -> int:
        return self.codes

    def frames(self, video: Tensor) -> Tensor:
        """The frames between which actions lead, `(B, 3, 1 + n, H, W)`. Raises ValueError where there are none."""
        frames = video[:, :, :: self.stride]
        if frames.shape[2] < 2 or video.shape[3] % self.patch or video.shape[4] % self.patch:
            raise ValueError(
                f"actions lead over {self.stride} frames or more of sides that are multiples of {self.patch}; "
                f"got {video.shape[2]} frames of {video.shape[3]} x {video.shape[4]}"
            )
        return frames

    def _patches(self, frames: Tensor) -> Tensor:
        return rearrange(frames, "b c t (h p) (w q) -> b t h w (c p q)", p=self.patch, q=self.patch)

    def latents(self, frames: Tensor) -> Tensor:
        """What happens before each frame but the first: `(B, dim, n, 1, 1)`, not quantized."""
        x = self.encoder(self.enter(self._patches(frames)))
        return self.name(x[:, 1:].mean((2, 3), keepdim=True)).movedim(-1, 1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Actions `(B, n)` of a clip `(B, 3, 1 + n * stride, H, W)` in [-1, 1]."""
        was = self.quantizer.training
        self.quantizer.eval()  # codes follow what they stand for in training alone
        ids = self.quantizer(self.latents(self.frames(video)))[1].flatten(1)
        self.quantizer.train(was)
        return ids

    def predict(self, frames: Tensor, actions: Tensor) -> Tensor:
        """Frames 2 to t + 1 `(B, 3, t, H, W)` from frames 1 to t and actions `(B, t)` or their vectors `(B, dim, t, 1,
        1)`."""
        if not actions.is_floating_point():
            actions = self.quantizer.lookup(actions[..., None, None])
        x = self.begin(self._patches(frames)) + self.told(actions.movedim(1, -1))
        y = (self.leave(self.decoder(x)) / 2).tanh()  # the paper's sigmoid, in [-1, 1]
        return rearrange(y, "b t h w (c p q) -> b c t (h p) (w q)", p=self.patch, q=self.patch)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """All frames but the first as they are predicted, the actions `(B, n)`, and loss terms of the codes."""
        frames = self.frames(video)
        actions, ids, losses = self.quantizer(self.latents(frames))
        return self.predict(frames[:, :, :-1], actions), ids.flatten(1), losses
