"""Continuous tokens in masked order: hidden ones are predicted from both sides, some of them denoised in each pass.

"Autoregressive Image Generation without Vector Quantization" (MAR, arXiv:2406.11838), section 3.4 and appendix A, with
the network and the loss of token_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reelm.lm.masked import MASK, check_schedule, counts
from reelm.lm.sampling import Generators, with_twin
from reelm.lm.sequence import Sequence
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion, normal
from reelm.lm.vocabulary import Special, Vocabulary


@dataclass(frozen=True)
class MaskedDenoising(TokenDenoising):
    """How to draw continuous tokens in masked order.

    passes: through the transformer. schedule: how many tokens stay hidden after each: cosine, uniform or exponential.
    """

    passes: int = 64
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.schedule)
        if self.passes < 1:
            raise ValueError(f"passes is 1 or more; got {self.passes}")


class MaskedTokenDiffusion(TokenDiffusion):
    """Hides a random share of the tokens to make behind the vector of `<mask>`, and learns to denoise them.

    Args:
        vocabulary, width, channels, hidden, depth, repeats: as for `TokenDiffusion`.
        least: the hidden share is drawn from this to 1; the paper has 0.7.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        channels: int,
        hidden: int = 256,
        depth: int = 3,
        repeats: int = 4,
        least: float = 0.7,
    ) -> None:
        super().__init__(vocabulary, width, channels, hidden, depth, repeats)
        if not 0 <= least <= 1:
            raise ValueError(f"least lies in [0, 1]; got {least}")
        self.least = least

    def hide(self, sequence: Sequence) -> Tensor:
        """Which of the tokens to predict are hidden in a step of training: `(B, L)` bool, one or more in each row."""
        (batch, length), device = sequence.ids.shape, sequence.ids.device
        columns = sequence.loss[0].nonzero()[:, 0]
        if not len(columns):
            raise ValueError("no token of this batch is to be predicted; its loss mask is empty")
        share = self.least + (1 - self.least) * torch.rand(batch, 1, device=device)
        rank = torch.rand(batch, len(columns), device=device).argsort(-1).argsort(-1)
        hidden = torch.zeros(batch, length, dtype=torch.bool, device=device)
        hidden[:, columns] = rank < (share * len(columns)).ceil().clamp_min(1)
        return hidden

    def shown(self, sequence: Sequence, hidden: Tensor) -> Sequence:
        """What the transformer sees: `<mask>` in place of hidden tokens, everything in both directions, and each column
        asks for its own place."""
        return sequence.replace(
            ids=torch.where(hidden, MASK, sequence.ids),
            latents=sequence.latents.masked_fill(hidden[..., None], 0.0),
            prefix=sequence.length,
            loss=None,
            next_positions=sequence.positions,
        )

    def learn(self, states: Callable[[Sequence], Tensor], sequence: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the hidden tokens, each under the hidden state of its own column."""
        hidden = self.hide(sequence)
        return self.denoising(states(self.shown(sequence, hidden))[hidden], sequence.latents[hidden])


@torch.inference_mode()
def fill_latents(
    transformer: nn.Module,
    head: MaskedTokenDiffusion,
    sequence: Sequence,
    sampling: TokenDenoising = MaskedDenoising(),
    unconditional: Sequence | None = None,
    generator: Generators = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Makes what a sequence's loss mask marks, the same columns in each row, in an order drawn anew for each row;
    nothing else changes.

    Args:
        sampling: a plain `TokenDenoising` is taken with the defaults of `MaskedDenoising`.
        unconditional, generator: as in `sampling.generate`.
        callback: called with the number of tokens made and the `(B, N, D)` latents, 0 where not, after each pass.

    Returns the latents of the marked columns `(B, N, D)`.
    """
    if not isinstance(sampling, MaskedDenoising):
        sampling = MaskedDenoising(**vars(sampling))
    batch, columns = len(sequence), sequence.loss[0].nonzero()[:, 0]
    sequence = with_twin(sequence, unconditional, sampling.guidance)
    copies = len(sequence) // batch
    device = sequence.ids.device
    order = columns[normal((batch, len(columns)), generator, device).argsort(-1)]
    hidden, latents = sequence.loss.clone(), sequence.latents.clone()
    done = 0
    for remain in counts(len(columns), sampling.passes, sampling.schedule):
        chosen = order[:, done : len(columns) - remain]
        shown = head.shown(sequence.replace(latents=latents), hidden)
        x = transformer(head.vectors(shown), shown)
        told = x.gather(1, chosen.repeat(copies, 1)[..., None].expand(-1, -1, x.shape[-1])).flatten(0, 1)

        def noise(count: int = chosen.shape[1]) -> Tensor:
            return normal((batch, count, head.channels), generator, device).flatten(0, 1)

        new = head.sample(told, sampling, noise).unflatten(0, (batch, -1)).repeat(copies, 1, 1).to(latents)
        places = chosen.repeat(copies, 1)
        latents.scatter_(1, places[..., None].expand(-1, -1, head.channels), new)
        hidden.scatter_(1, places, False)
        sequence = sequence.replace(ids=sequence.ids.scatter(1, places, int(Special.latent)))
        done = len(columns) - remain
        if callback is not None:
            callback(done, latents[:batch, columns])
    return latents[:batch, columns].clone()
