"""From scores to ids: samplers are functions, and generation is a loop over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.lm.heads import Head
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    temperature: divides the logits; 0 takes the most probable token.
    top_k: only the k most probable tokens; 0: all.
    top_p: only the most probable tokens that together reach this probability; 1: all.
    guidance: scale of classifier-free guidance; 1: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is 0 or more; got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k is 0 (all tokens) or more; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p lies in (0, 1]; got {self.top_p}")
        if self.guidance < 0:
            raise ValueError(f"guidance is 0 or more (1: none); got {self.guidance}")


def seeded(seeds: list[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator a sample, so that a sample does not depend on its neighbours in the batch."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def exponential(like: Tensor, generator: Generators) -> Tensor:
    """Standard exponential noise of a tensor's shape; with one generator a sample, each fills its row."""
    noise = torch.empty_like(like)
    if isinstance(generator, list):
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators for {len(like)} samples; give one a sample")
        for row, one in zip(noise, generator, strict=True):
            row.exponential_(generator=one)
        return noise
    return noise.exponential_(generator=generator)


def _sorted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, the highest first, and whose they are."""
    if logits.device.type != "cpu":
        return logits.sort(-1, descending=True)
    rows = [row.sort(descending=True) for row in logits.contiguous()]  # 10 times as fast as all rows at once
    return torch.stack([row.values for row in rows]), torch.stack([row.indices for row in rows])


def sample_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generators = None,
) -> Tensor:
    """Draws one token a row from logits `(..., V)`: `(...)` int64. See `Sampling` for the arguments.

    Nucleus sampling (arXiv:1904.09751) keeps the token with which the sum first reaches `top_p`. The draw is a race
    of exponential clocks: the smallest of noise over probability wins with that probability.
    """
    if temperature == 0:
        return logits.argmax(-1)
    size = logits.shape[-1]
    if 0 < top_k < size:
        logits, tokens = logits.topk(top_k)  # sorted, the most probable first
    elif top_p < 1:
        logits, tokens = _sorted(logits)
    else:
        tokens = None
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    noise = exponential(probabilities, generator).clamp_min_(1e-30)  # a drawn 0 would make 0 / 0
    choice = (probabilities / noise).argmax(-1)
    return choice if tokens is None else tokens.gather(-1, choice[..., None]).squeeze(-1)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598): the first half of the rows is conditional, the second is not."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


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
    """Continues a sequence token by token.

    Args:
        sequence: all that is known, tokens of the target among them; its prefix is read in both directions.
        positions: `(B, steps, 3)` or `(steps, 3)`: where the tokens to make are, in the order of making.
        unconditional: the same without the condition, of the same shape; needed for guidance other than 1. Both are
            computed as one batch.
        generator: for the whole batch, or one a sample (`seeded`).
        callback: called with the number of tokens made and the newest `(B,)` ids after each step.

    Returns ids `(B, steps)`.
    """
    batch, steps = len(sequence), positions.shape[-2]
    positions = positions.expand(batch, steps, 3)
    copies = 1 if sampling.guidance == 1 else 2
    sequence = sequence.replace(loss=None)
    if copies == 2:
        if unconditional is None:
            raise ValueError(f"guidance {sampling.guidance} needs a sequence without the condition; or set guidance=1")
        sequence = Sequence.cat([sequence, unconditional.replace(loss=None)])
        positions = positions.repeat(2, 1, 1)

    def sampler(logits: Tensor) -> Tensor:
        if copies == 2:
            logits = guide(logits, sampling.guidance)
        return sample_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p, generator)

    ids = positions.new_empty(batch, steps)
    cache = transformer.new_cache(len(sequence), sequence.length + steps)
    current = sequence.replace(next_positions=torch.cat([sequence.positions[:, 1:], positions[:, :1]], 1))
    with torch.inference_mode():
        for step in range(steps):
            hidden = transformer(head.embed(current.ids), current, cache)
            newest = head.sample(hidden[:, -1], sampler)
            ids[:, step] = newest
            if callback is not None:
                callback(step + 1, newest)
            here, following = positions[:, step : step + 1], positions[:, step + 1 : step + 2]
            if step + 1 < steps:
                current = Sequence(newest.repeat(copies)[:, None], here, prefix=0, next_positions=following)
    return ids
