"""From scores to ids: how tokens are chosen. In which passes they are made is decoding.py's matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reelm.lm.sequence import Sequence

Generators = torch.Generator | list[torch.Generator] | None

FEW = 64  # tokens among which those that reach top_p are looked for first
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {  # share of the guidance after a share of the tokens
    "constant": torch.ones_like,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - (math.pi * progress).cos()) / 2,
}


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    temperature: divides the logits; 0 takes the most probable token.
    top_k: only the k most probable tokens; 0: all.
    top_p: only the most probable tokens that together reach this probability; 1: all.
    guidance: scale of classifier-free guidance; 1: none.
    guidance_schedule: "constant", or guidance that grows from 1 at the first token to its scale at the last: "linear"
        (as in Muse, arXiv:2301.00704, section 2.7) or "cosine".
    sound_temperature: of the tokens of sound; None: the same.
    decoding: in which passes the tokens are made (`decoding.Decoding`); None: one after the other, or in those that the
        caller prefers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    guidance_schedule: str = "constant"
    sound_temperature: float | None = None
    decoding: Callable | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "sound_temperature"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} is a number from 0 on; got {getattr(self, name)}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is 0 (all tokens) or a whole number above; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p lies in (0, 1]; got {self.top_p}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is a number from 0 on (1: none); got {self.guidance}")
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule is one of {', '.join(SCHEDULES)}; got {self.guidance_schedule}")

    @property
    def of_sound(self) -> Sampling:
        """How to choose tokens of sound."""
        return self if self.sound_temperature is None else replace(self, temperature=self.sound_temperature)

    def scale(self, progress: Tensor) -> Tensor:
        """Scales of guidance where this share of the tokens, in [0, 1], is made."""
        return 1 + (self.guidance - 1) * SCHEDULES[self.guidance_schedule](progress)

    def probabilities(self, logits: Tensor) -> Tensor:
        """`truncated` with this temperature and these limits."""
        return truncated(logits, self.temperature, self.top_k, self.top_p)


def seeded(seeds: list[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator a sample, so that a sample does not depend on its neighbours in the batch."""
    return [torch.Generator(device).manual_seed(_folded(seed)) for seed in seeds]


def go_on(generator: Generators, number: int) -> None:
    """Lets generators of a run that stopped after `number` tokens draw what they did not draw before.

    The highest bit is one that the seeds of other parts do not have.
    """
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None:
            one.manual_seed(_folded(one.initial_seed() + (number << 32) + (1 << 63)))


def _folded(seed: int) -> int:
    """The seed in 32 bits, all that torch's generator on CPUs takes: the bits above them would change nothing."""
    high, low = divmod(seed, 1 << 32)
    return low ^ (high * 0x9E3779B1) % (1 << 32)


def exponential(like: Tensor, generator: Generators) -> Tensor:
    """Standard exponential noise of a tensor's shape; with one generator a sample, each fills its row."""
    noise = torch.empty_like(like)
    if isinstance(generator, list):
        if len(generator) != len(noise):
            raise ValueError(f"{len(generator)} generators for {len(noise)} samples; give one a sample")
        for row, one in zip(noise, generator, strict=True):
            row.exponential_(generator=one)
    else:
        noise.exponential_(generator=generator)
    return noise.clamp_min_(1e-30)  # a drawn 0 would make 0 / 0


def truncated(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What tokens are drawn from, `(..., V)` float32 that sums to one, for logits `(..., V)`. See `Sampling`.

    Nucleus sampling (arXiv:1904.09751) keeps the token with which the sum first reaches `top_p`.
    """
    size = logits.shape[-1]
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if 0 < top_k < size:
        best, tokens = logits.topk(top_k)  # sorted, the most probable first
        kept = (best.float() / temperature).softmax(-1)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, tokens, _nucleus(kept, top_p))
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p == 1:
        return probabilities
    kept, tokens = probabilities.topk(min(FEW, size))
    if size > FEW and bool((kept.sum(-1) < top_p).any()):  # otherwise sorting them all, which takes long, is spared
        kept, tokens = probabilities.sort(-1, descending=True)
    return torch.zeros_like(probabilities).scatter_(-1, tokens, _nucleus(kept, top_p))


def _nucleus(kept: Tensor, top_p: float) -> Tensor:
    """The most probable of sorted probabilities that together reach `top_p`, made to sum to one."""
    if top_p < 1:
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= top_p, 0.0)
        kept /= kept.sum(-1, keepdim=True)
    return kept


def race(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draws one token a row: the smallest of exponential noise over probability wins with that probability.

    The same noise draws the same token again as long as the probabilities change little (the Gumbel coupling).
    """
    return (probabilities / noise).argmax(-1)


def sample_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: Generators = None
) -> Tensor:
    """Draws one token a row from logits `(..., V)`: `(...)` int64. See `Sampling` for the arguments."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = truncated(logits, temperature, top_k, top_p)
    return race(probabilities, exponential(probabilities, generator))


def with_twin(sequence: Sequence, unconditional: Sequence | None, guidance: float) -> Sequence:
    """What guidance computes as one batch: a sequence, followed by its twin without the condition where guidance is
    other than 1. ValueError where that is missing."""
    if guidance == 1:
        return sequence
    if unconditional is None:
        raise ValueError(f"guidance {guidance} needs a sequence without the condition; or set guidance=1")
    return Sequence.cat([sequence, unconditional])


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598): the first half of the rows is conditional, the second is not."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)
