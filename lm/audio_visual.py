"""A head for models of video and sound: which ids a column predicts says by which part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from reelm.lm.heads import Head
from reelm.lm.linear import Linear, linear
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import SPECIAL, Vocabulary


class Level(Head):
    """A full softmax over the codes of one level of sound. It makes no vectors of ids: `AudioVisual` lends it those.

    Args:
        vocabulary, width: as for all heads.
        offset, size: the range of ids.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, offset: int, size: int) -> None:
        super().__init__(vocabulary, width, offset, size, embeds=False)
        self.scores = Linear(width, size)
        nn.init.zeros_(self.scores.weight)
        self.embedding: list[Head] = []  # in a list: no part of this one

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding[0].embed(ids)

    def logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return (linear(hidden, self.scores.weight),)

    def split(self, codes: Tensor) -> tuple[Tensor, ...]:
        return (codes,)

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0]


class AudioVisual(nn.Module):
    """A head of video that also makes the vectors of all ids, and one for each level of sound.

    Levels are predicted by different columns, each among its own codes alone. To sample, take the part: `visual`, or
    `sound[level]`.

    Args:
        vocabulary, width: as for all heads.
        visual: the head of video, or what makes it of vocabulary and width.
        levels: of the sound; the vocabulary's audio ids are divided among them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        visual: Head | Callable[..., Head],
        levels: int = 4,
    ) -> None:
        super().__init__()
        if levels < 1 or not vocabulary.audio or vocabulary.audio % levels:
            raise ValueError(
                f"{vocabulary.audio} audio ids are not the same number of codes for each of {levels} levels"
            )
        self.vocabulary, self.width, self.levels = vocabulary, width, levels
        self.visual = visual if isinstance(visual, nn.Module) else visual(vocabulary=vocabulary, width=width)
        if not isinstance(self.visual, Head):
            raise ValueError(f"sound needs a head that predicts token by token; {type(self.visual).__name__} does not")
        codes, start = vocabulary.audio // levels, vocabulary.audio_range.start
        self.sound = nn.ModuleList(Level(vocabulary, width, start + level * codes, codes) for level in range(levels))
        for level in self.sound:
            level.embedding.append(self.visual)

    @property
    def size(self) -> int:
        """Number of visual codes."""
        return self.visual.size

    @property
    def others(self) -> nn.Embedding:
        """The vectors of ids that are not predicted as video."""
        return self.visual.others

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors `(B, L, width)` of ids `(B, L)` from anywhere in the vocabulary."""
        return self.visual.embed(ids)

    def vectors(self, sequence: Sequence) -> Tensor:
        """Vectors `(B, L, width)` of a sequence's ids."""
        return self.visual.vectors(sequence)

    def learn(self, states: Callable[[Sequence], Tensor], sequence: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step of training, and what to log; see `Head.learn`."""
        return self.loss(states(sequence), sequence.ids, sequence.loss)

    def loss(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of all ids to predict, each by its part; see `Head.loss`."""
        losses, logged, weights, counts = [], [], [], []
        for part, mine in self._parts(ids, mask):
            loss, metrics = part.loss(hidden, ids, mine)
            losses.append(loss)
            logged.append(metrics)
            weights.append(mine[:, 1:].float().abs().sum())
            counts.append((mine[:, 1:] != 0).sum())
        if not losses:
            raise ValueError("no id of this batch is to be predicted; its loss mask is empty")
        mean = {name: _mean([each[name] for each in logged], counts) for name in logged[0]}
        return _mean(losses, weights), mean

    def divergence(self, hidden: Tensor, other: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """That of each id's part; see `Head.divergence`."""
        return sum(part.divergence(hidden, other, ids, mine) for part, mine in self._parts(ids, mask))

    def _parts(self, ids: Tensor, mask: Tensor) -> Iterator[tuple[Head, Tensor]]:
        """Heads, and which ids they are to predict."""
        for part in (self.visual, *self.sound):
            mine = mask * ((ids >= part.offset) & (ids < part.offset + part.size))
            if mine[:, 1:].any():
                yield part, mine

    def inflate(self, weights: dict[str, Tensor], name: str, small: nn.Module) -> None:
        """Takes the weights of a model without sound: its head is the one of video, its ids of text come after those
        of sound."""
        if isinstance(small, AudioVisual):
            return
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            weights[f"{name}.visual.{key[len(name) + 1 :]}"] = weights.pop(key)
        rows = self.visual.others.weight.detach().clone()
        stored = weights[f"{name}.visual.others.weight"]
        text = SPECIAL + self.vocabulary.audio
        rows[:SPECIAL] = stored[:SPECIAL]
        rows[text : text + small.vocabulary.text] = stored[SPECIAL + small.vocabulary.audio :]
        weights[f"{name}.visual.others.weight"] = rows


def _mean(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    shares = torch.stack(weights)
    return (shares * torch.stack(values)).sum() / shares.sum()
