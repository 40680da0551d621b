"""In which passes tokens are made: one after the other here, several at a time in speculative.py and parallel.py.

A decoding is a function of a `Run` and its `Noise` that yields tokens as soon as they are certain. The noise of a token
depends on the seed and on the token's number, not on the passes: decodings that are exact make the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.lm.compiled import Passes
from reelm.lm.heads import Head
from reelm.lm.sampling import Generators, Sampling, exponential, guide, race, with_twin
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer

SPARE = 128  # columns of the cache of compiled passes, which are filled up to few different shapes


class Run:
    """A sequence that is being continued: its cache, and its twin without the condition where guidance needs one.

    Args:
        sequence: all that is known, tokens of the target among them.
        positions: `(B, steps, 3)` or `(steps, 3)`: where the tokens to make are.
        unconditional: the same without the condition, of the same shape; needed for guidance other than 1.
    """

    def __init__(
        self,
        transformer: Transformer,
        head: Head,
        sequence: Sequence,
        positions: Tensor,
        sampling: Sampling,
        unconditional: Sequence | None = None,
    ) -> None:
        self.transformer, self.head, self.sampling = transformer, head, sampling
        self.sequence = sequence.replace(loss=None)
        self.batch, self.steps, self.passes = len(sequence), positions.shape[-2], 0
        twin = None if unconditional is None else unconditional.replace(loss=None)
        self.given: Sequence | None = with_twin(self.sequence, twin, sampling.guidance)
        self.copies = len(self.given) // self.batch
        self.positions = positions.expand(self.batch, self.steps, 3).repeat(self.copies, 1, 1)
        self.columns = sequence.length
        self.compiled: Passes | None = getattr(transformer, "passes", None)  # of VideoLM.lighten
        self.width = 0  # of the widest pass but the first
        room = self.columns + self.steps
        if self.compiled is not None:
            room = -(-(room + SPARE) // SPARE) * SPARE
        self.cache = transformer.new_cache(self.batch * self.copies, room)

    def read(self, ids: Tensor, of: slice | Tensor, target: slice | Tensor) -> Tensor:
        """Hidden states `(copies * B, N, width)` that predict the tokens numbered `target`, of which there are N.

        ids: `(B, n)` tokens to read, those numbered `of`; the column of each predicts one target. The first pass reads
            the sequence before them, whose last column predicts the first target: it has one target more.
        """
        ids = ids.repeat(self.copies, 1)
        here, there = self.positions[:, of], self.positions[:, target]
        current, self.given = self.given, None
        if current is None:
            current = Sequence(ids, here, prefix=0, next_positions=there)
        else:
            current = current.replace(
                ids=torch.cat([current.ids, ids], 1),
                positions=torch.cat([current.positions, here], 1),
                next_positions=torch.cat([current.positions[:, 1:], there], 1),
            )
        self.passes += 1
        x = self.head.embed(current.ids)
        if self.passes > 1:
            self.width = max(self.width, x.shape[1])
        if self.compiled is not None and self.passes > 1 and self.compiled.fit(current, self.cache, self.width):
            hidden = self.compiled(x, current, self.cache, self.width)
        else:
            hidden = self.transformer(x, current, self.cache)
        return hidden[:, -there.shape[1] :]

    def forget(self, columns: int) -> None:
        """Drops all columns from the cache but those of the sequence and of `columns` tokens."""
        self.cache.rewind(self.columns + columns)

    def choose(self, hidden: Tensor, target: slice | Tensor, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Ids `(B, N)` for the hidden states of the tokens numbered `target`.

        draw: from probabilities `(B * N, V)`, and the number of the code's part that they are of, to choices.
        """
        count, part = hidden.shape[1], 0
        scale: float | Tensor = self.sampling.guidance
        if self.copies == 2 and self.sampling.guidance_schedule != "constant":
            numbers = torch.arange(self.steps, device=hidden.device)[target]
            scale = self.sampling.scale(numbers / max(self.steps - 1, 1)).repeat(self.batch)[:, None]

        def sampler(logits: Tensor) -> Tensor:
            nonlocal part
            part += 1
            if self.copies == 2:
                logits = guide(logits, scale)
            return draw(self.sampling.probabilities(logits), part - 1)

        return self.head.sample(hidden.flatten(0, 1), sampler).view(self.batch, count)


class Noise:
    """The exponential noise of each token, drawn in the tokens' order and kept until it is dropped.

    Args:
        sizes: number of values of each part of a code (`Head.part_sizes`).
        batch: number of samples.
        generator: for the whole batch, or one a sample (`seeded`).
    """

    def __init__(self, sizes: tuple[int, ...], batch: int, generator: Generators, device: torch.device) -> None:
        self.sizes, self.batch, self.generator, self.device = sizes, batch, generator, device
        self.drawn = 0
        self.kept: dict[int, tuple[Tensor, ...]] = {}

    def drop(self, before: int) -> None:
        """Forgets the noise of the tokens before this one."""
        for number in range(min(self.kept, default=self.drawn), before):
            self._upto(number + 1)
            self.kept.pop(number)

    def draw(self, numbers: Iterable[int]) -> Callable[[Tensor, int], Tensor]:
        """What draws these tokens: from probabilities `(B * N, V)` of one part of codes to choices."""
        numbers = list(numbers)
        self._upto(max(numbers) + 1)
        parts = [torch.stack(part, 1).flatten(0, 1) for part in zip(*(self.kept[n] for n in numbers), strict=True)]
        return lambda probabilities, part: race(probabilities, parts[part])

    def _upto(self, stop: int) -> None:
        for number in range(self.drawn, stop):
            self.kept[number] = tuple(self._one(n) for n in self.sizes)
        self.drawn = max(self.drawn, stop)

    def _one(self, size: int) -> Tensor:
        return exponential(torch.empty(self.batch, size, device=self.device), self.generator)


Decoding = Callable[[Run, Noise, Tensor], Iterator[tuple[Tensor, Tensor]]]
"""From a run, its noise and the ids `(B, n)` that it yielded first before it was interrupted, to the numbers `(k,)` and
ids `(B, k)` of all tokens, those that were made before among them."""


@dataclass(frozen=True)
class OneByOne:
    """Next-token prediction."""

    def __call__(self, run: Run, noise: Noise, made: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        ids, start, begin = made, 0, made.shape[1]
        noise.drop(begin)
        if begin:
            yield torch.arange(begin), made
        for number in range(begin, run.steps):
            here = slice(number, number + 1)
            hidden = run.read(ids, slice(start, number), slice(0, number + 1) if number == begin else here)
            ids = run.choose(hidden[:, -1:], here, noise.draw([number]))
            noise.drop(number + 1)
            start = number
            yield torch.arange(number, number + 1), ids


@torch.inference_mode()
def decode(
    transformer: Transformer,
    head: Head,
    sequence: Sequence,
    positions: Tensor,
    sampling: Sampling = Sampling(),
    unconditional: Sequence | None = None,
    generator: Generators = None,
    made: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continues a sequence; yields the numbers `(k,)` and the ids `(B, k)` of tokens as soon as they are certain.

    Args:
        sequence: all that is known, tokens of the target among them; its prefix is read in both directions.
        positions: `(B, steps, 3)` or `(steps, 3)`: where the tokens to make are, in the order of making.
        sampling: how; `sampling.decoding` says in which passes.
        unconditional: the same without the condition, of the same shape; needed for guidance other than 1. Both are
            computed as one batch.
        generator: for the whole batch, or one a sample (`seeded`), as it was before the first token.
        made: ids `(B, n)` that were yielded before, where a run goes on that was interrupted; they come first again.
    """
    run = Run(transformer, head, sequence, positions, sampling, unconditional)
    noise = Noise(head.part_sizes, run.batch, generator, positions.device)
    made = positions.new_empty(run.batch, 0) if made is None else made
    yield from (sampling.decoding or OneByOne())(run, noise, made)


def generate(
    transformer: Transformer,
    head: Head,
    sequence: Sequence,
    positions: Tensor,
    sampling: Sampling = Sampling(),
    unconditional: Sequence | None = None,
    generator: Generators = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """All ids `(B, steps)` of `decode`.

    callback: called with the number of tokens made and the newest ids `(B, k)` after each pass.
    """
    ids, count = positions.new_empty(len(sequence), positions.shape[-2]), 0
    for numbers, newest in decode(transformer, head, sequence, positions, sampling, unconditional, generator):
        ids[:, numbers] = newest
        count += len(numbers)
        if callback is not None:
            callback(count, newest)
    return ids
