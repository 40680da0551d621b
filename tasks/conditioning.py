"""From what is given to what a denoiser is told.

The convention of what is known is the task's: leading frames that are known are the first latents of the clip itself
and are kept; everything else that is known comes as latents of a clip with the unknown pixels grey, with a mask that
tells frame by frame which share of a latent's pixels is known.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.diffusion.conditions import Conditions
from reelm.tasks.preparing import Preparing
from reelm.tasks.task import Given
from reelm.tokenizers.latents import LatentSpace
from reelm.tokenizers.text import SentencePieceText, T5Text


class Conditioner(Preparing):
    """Tells a denoiser what is given, for one tokenizer and text model."""

    def __init__(self, tokenizer: nn.Module, text: SentencePieceText | T5Text) -> None:
        super().__init__(tokenizer, text)
        self.space = LatentSpace(tokenizer)

    def conditions(self, given: Given, target: Tensor | None = None, unprompted: Tensor | bool = False) -> Conditions:
        """Of a batch.

        target: latents of the whole clip `(B, D, t, h, w)` for training, whose first frames are those that are kept.
        unprompted: `(B,)` bool, whose prompts are left out; True for all.
        """
        device = self.tokenizer.device
        text, text_mask = self._text(given.captions, torch.as_tensor(unprompted, device=device))
        known, shares, kept = self._known(given, target)
        fps = torch.full((len(given),), float(given.fps), device=device)
        return Conditions(text, text_mask, known, shares, kept, self._control(given), fps)

    def _text(self, captions: tuple[str, ...], drop: Tensor) -> tuple[Tensor, Tensor]:
        """Word pieces `(B, N)` or vectors `(B, N, W)`, and which of them count."""
        drop = drop | torch.tensor([not caption for caption in captions], device=drop.device)
        if not self.text.vocabulary:
            vectors, mask = (x.to(drop.device) for x in self.text(list(captions)))
            return vectors.float(), mask & ~drop[:, None]
        rows, slots = self.text.encode(list(captions)), self.slots(captions)
        text = torch.tensor([row + [0] * (slots - len(row)) for row in rows], device=drop.device)
        counts = torch.tensor([len(row) for row in rows], device=drop.device)
        return text, (torch.arange(slots, device=drop.device) < counts[:, None]) & ~drop[:, None]

    def _known(self, given: Given, target: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Latents of what is known, its shares, and which latent frames are kept."""
        if given.known is None or not given.known.any():
            return None, None, None
        frames = given.shape[0]
        leading = self.prefix_frames(given)
        count = self.known_latents(given)
        shares = self._shares(given)
        later = F.pad(given.known, (0, 0, 0, 0, 0, frames - given.known.shape[2]))[:, :, leading:]
        if later.any():
            known = self.space.encode(F.pad(given.video, (0, 0, 0, 0, 0, frames - given.video.shape[2])))
        else:  # the latents of the first frames say it all
            first = self.space.encode(given.video[:, :, :leading]) if target is None else target[:, :, :count]
            known = F.pad(first, (0, 0, 0, 0, 0, shares.shape[2] - count))
        known = known * (shares.amax(1, keepdim=True) > 0)
        if not count:
            return known, shares, None
        kept = torch.arange(shares.shape[2], device=known.device) < count
        return known, shares, kept.expand(len(given), -1)

    def _shares(self, given: Given) -> Tensor:
        """Known share of each frame of each latent, `(B, S, t, h, w)`. The first latent has one frame, S times."""
        grid, step = self.grid(given), self.tokenizer.compression[0]
        known = F.adaptive_avg_pool2d(given.known[:, 0].float(), grid[1:])  # (B, T, h, w)
        known = F.pad(known, (0, 0, 0, 0, 0, given.shape[0] - known.shape[1]))
        first = known[:, :1].expand(-1, step, -1, -1).unsqueeze(2)
        return torch.cat([first, known[:, 1:].unflatten(1, (grid[0] - 1, step)).transpose(1, 2)], 2)

    def _control(self, given: Given) -> Tensor | None:
        if given.condition is None:
            return None
        if tuple(given.condition.shape[2:]) != tuple(given.shape):
            raise ValueError(
                f"the video that says what to make is {tuple(given.condition.shape[2:])}, the clip to make "
                f"{tuple(given.shape)}; give both the same frames, height and width"
            )
        return self.space.encode(given.condition)
