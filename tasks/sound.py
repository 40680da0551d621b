"""Sound in the sequence: which ids, in which order, at which places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.task import Given

SOUND_ROW = 64  # a level's codes have this row, and the next ones, at the time of the video they are heard with


class SoundTokens:
    """The tokens of clips' sound, level by level, coarse to fine (VideoPoet, arXiv:2312.14125, section 3.1).

    Args:
        tokenizer: of sound, with `encode`, `decode`, `rate`, `compression` (samples of a latent), `levels` and
            `vocabulary` (codes of a level).
        vocabulary: the language model's id space.
        step: frames of a latent frame of the video.
    """

    def __init__(self, tokenizer: nn.Module, vocabulary: Vocabulary, step: int) -> None:
        if vocabulary.audio != tokenizer.levels * tokenizer.vocabulary:
            raise ValueError(
                f"the vocabulary has {vocabulary.audio} audio ids; {tokenizer.levels} levels of {tokenizer.vocabulary} "
                "codes are another number"
            )
        self.tokenizer, self.vocabulary, self.step = tokenizer, vocabulary, step

    def samples(self, given: Given) -> int:
        """Length of the sound of what is to be made."""
        return round(given.shape[0] / given.fps * self.tokenizer.rate)

    def latents(self, given: Given) -> int:
        return -(-self.samples(given) // self.tokenizer.compression)

    def encode(self, audio: Tensor, rate: int | None) -> Tensor:
        """Codes `(B, t, levels)` of a sound `(B, C, N)`; ValueError for one at another rate than the tokenizer's."""
        if rate != self.tokenizer.rate:
            raise ValueError(
                f"the sound has {rate} samples a second; this model hears {self.tokenizer.rate}: resample it"
            )
        return self.tokenizer.encode(audio)

    def known(self, given: Given) -> Tensor | None:
        """Codes `(B, t, levels)` of the sound that is known: of whole latents, or of all where all is known."""
        if given.audio is None:
            return None
        audio, whole = given.audio[..., : self.samples(given)], self.tokenizer.compression
        if audio.shape[-1] < self.samples(given):
            audio = audio[..., : audio.shape[-1] // whole * whole]
        return self.encode(audio, given.audio_rate) if audio.shape[-1] else None

    def ids(self, codes: Tensor) -> Tensor:
        """Ids of the language model `(B, levels * t)` of codes `(B, t, levels)`."""
        first = torch.arange(codes.shape[-1], device=codes.device) * self.tokenizer.vocabulary
        return self.vocabulary.to_audio((codes + first).transpose(1, 2).flatten(1))

    def codes(self, ids: Tensor) -> Tensor:
        """Codes `(B, t, levels)` of ids `(B, levels * t)` of the language model."""
        levels = self.tokenizer.levels
        codes = self.vocabulary.from_audio(ids).unflatten(1, (levels, -1)).transpose(1, 2)
        return codes - torch.arange(levels, device=ids.device) * self.tokenizer.vocabulary

    def positions(self, start: int, stop: int, fps: float, device: torch.device | None = None) -> Tensor:
        """(time, row, column) `(levels, stop - start, 3)` of the latents from `start` on.

        Time is that of the latent frame of the video that is seen when the latent begins, the row tells the level, the
        column counts the latents of one time.
        """
        seconds = torch.arange(stop, device=device, dtype=torch.float64) * (
            self.tokenizer.compression / self.tokenizer.rate
        )
        frames = (seconds * fps + 1e-6).floor().long()  # rounding must not move a latent to the frame before
        time = -(-frames // self.step)
        column = torch.arange(stop, device=device) - torch.searchsorted(time, time)
        where = torch.stack([time, torch.zeros_like(time), column], -1)[start:]
        rows = torch.arange(self.tokenizer.levels, device=device) + SOUND_ROW
        where = where.repeat(len(rows), 1, 1)
        where[..., 1] = rows[:, None]
        return where

    def places(self, given: Given, device: torch.device | None = None) -> Tensor:
        """Positions of the codes of the sound to make, `(levels, n, 3)`."""
        known = self.known(given)
        return self.positions(0 if known is None else known.shape[1], self.latents(given), given.fps, device)
