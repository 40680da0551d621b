"""How much each id counts in the loss of training.

What decides a clip stands in few of its ids, and what follows from it in most: after a first frame with the wrong
objects, or a sound's first code with the wrong voice, all others can be predicted well.

All weights are told by what comes before an id, none by the id itself, so that what is learned best is still the
distribution of the data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Weighting:
    """Weights beside 1 of all other ids.

    frames: of the codes of a clip's first latent frames, in order; those of later frames count 1. The first frame says
        what there is, the second how it moves.
    levels: of the codes of each level of sound; () for 1 everywhere. Coarse levels say what is heard, fine ones are
        noise to a small model.
    onset: times that the first code to predict of each level of sound counts more. Where sounds go on as they begin, it
        is the only one that tells whether the model heeds what it is given.
    prompt: an id counts this many times more for each nat by which what the model expects there is another without the
        prompt (`Head.divergence`). 0: the prompt is not looked at, and there is no second pass.
    """

    frames: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    onset: float = 1.0
    prompt: float = 0.0

    def __post_init__(self) -> None:
        for name in ("frames", "levels"):
            given = getattr(self, name)
            numbers = given if isinstance(given, Collection) else [None]
            if not all(isinstance(weight, int | float) and weight > 0 for weight in numbers):
                raise ValueError(f"{name[:-1]}_weights are a list of numbers above 0; got {given}")
            object.__setattr__(self, name, tuple(given))
        if self.onset <= 0:
            raise ValueError(f"onset={self.onset}; give a number above 0, of which 1 counts all ids alike")
        if self.prompt < 0:
            raise ValueError(f"prompt_weight={self.prompt}; give a number from 0 on, of which 0 counts all ids alike")

    def check(self, levels: int) -> None:
        """ValueError where there are not this many levels of sound, 0 for none."""
        if self.levels and not levels:
            raise ValueError("stage.level_weights is for tasks with sound: give stage.audio=..., or leave it out")
        if self.levels and len(self.levels) != levels:
            raise ValueError(
                f"level_weights are {levels} numbers, one for each level of sound; got {list(self.levels)}"
            )

    def of(self, sequence: Sequence, vocabulary: Vocabulary, levels: int = 0) -> Tensor:
        """`(B, L)`: weights of the ids to predict, 0 of all others; `sequence.loss` where all count alike.

        levels: of the sound, among which the vocabulary's audio ids are divided.
        """
        loud = levels > 0 and (bool(self.levels) or self.onset != 1)
        if not self.frames and not loud:
            return sequence.loss
        weights = sequence.loss.float()
        if self.frames:
            times, ids = sequence.positions[..., 0], sequence.ids
            visual = (ids >= vocabulary.visual_range.start) & (ids < vocabulary.visual_range.stop)
            table = weights.new_tensor([*self.frames, 1.0])
            weights = torch.where(visual, weights * table[times.clamp(0, len(self.frames))], weights)
        if not loud:
            return weights
        start, codes = vocabulary.audio_range.start, vocabulary.audio // levels
        level = torch.where(
            (sequence.ids >= start) & (sequence.ids < start + levels * codes), (sequence.ids - start) // codes, -1
        )
        if self.levels:
            weights = weights * weights.new_tensor([*self.levels, 1.0])[level]
        first = (level >= 0) & sequence.loss
        first[:, 1:] &= level[:, 1:] != level[:, :-1]
        return torch.where(first, self.onset * weights, weights)
