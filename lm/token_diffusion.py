"""A head for continuous tokens: each is denoised by itself, under what the transformer says of it.

"Autoregressive Image Generation without Vector Quantization" (MAR, arXiv:2406.11838), here in the order of next-token
prediction; masked_diffusion.py has the masked order. Noise comes and goes by a cosine,
`x_t = cos(pi t / 2) x + sin(pi t / 2) noise`, and the network predicts the velocity (arXiv:2202.00512, section 4)
rather than the noise, which says nothing where there is nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelm.lm.sampling import Generators, with_twin
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Special, Vocabulary


@dataclass(frozen=True)
class TokenDenoising:
    """How to draw continuous tokens.

    steps: from noise to a token. temperature: scales the noise that is added on the way. guidance: scale of
    classifier-free guidance; 1: none.
    """

    steps: int = 50
    temperature: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is 1 or more; got {self.steps}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is a number from 0 on; got {self.temperature}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is a number from 0 on (1: none); got {self.guidance}")


def normal(shape: tuple[int, ...], generator: Generators, device: torch.device | str | None = None) -> Tensor:
    """Standard normal noise, the rows of the first axis from their own generators where there are several."""
    if not isinstance(generator, list):
        return torch.randn(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} samples; give one a sample")
    return torch.stack([torch.randn(shape[1:], generator=one, device=device) for one in generator])


def cosines(time: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the token and of the noise at times in [0, 1]."""
    return (time * math.pi / 2).cos(), (time * math.pi / 2).sin()


class ResidualMLP(nn.Module):
    """A block that the condition shifts, scales and gates; at the start it is the identity."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden, 3 * hidden)
        self.layers = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, -1)
        return x + gate * self.layers(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


class TokenDenoiser(nn.Module):
    """A multi-layer perceptron with AdaLN: `(noisy (N, D), time (N,), hidden state (N, width)) -> (N, D)`."""

    def __init__(self, channels: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.frequencies = 64
        self.time = nn.Sequential(nn.Linear(2 * self.frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.told = nn.Linear(width, hidden)
        self.enter = nn.Linear(channels, hidden)
        self.blocks = nn.ModuleList(ResidualMLP(hidden) for _ in range(depth))
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.leave = nn.Linear(hidden, channels)
        for zero in (self.modulation, self.leave):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, noisy: Tensor, time: Tensor, told: Tensor) -> Tensor:
        steps = torch.arange(self.frequencies, device=time.device) / self.frequencies
        angles = 1000.0 * time[:, None] * torch.exp(-math.log(10_000) * steps)
        condition = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.told(told))
        x = self.enter(noisy)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, -1)
        return self.leave(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


class TokenDiffusion(nn.Module):
    """Continuous tokens in and out of a transformer; all other ids have vectors, as with the heads of codes.

    Args:
        vocabulary, width: as for all heads; the vocabulary has no visual ids.
        channels: numbers of a token.
        hidden, depth: width and blocks of the denoising network.
        repeats: times that each token's loss is taken, at other times and with other noise.
    """

    cannot_grow = ("channels", "hidden")  # several matrices lie in one (store.grow)
    measure = "mse"
    size = 0  # of the ids, it predicts none

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        channels: int,
        hidden: int = 256,
        depth: int = 3,
        repeats: int = 4,
    ) -> None:
        super().__init__()
        if repeats < 1:
            raise ValueError(f"repeats is 1 or more; got {repeats}")
        self.vocabulary, self.width, self.channels = vocabulary, width, channels
        self.hidden, self.depth, self.repeats = hidden, depth, repeats
        self.others = nn.Embedding(vocabulary.size, width)
        nn.init.normal_(self.others.weight, std=0.02)
        self.enter = nn.Linear(channels, width)
        self.denoiser = TokenDenoiser(channels, width, hidden, depth)

    def vectors(self, sequence: Sequence) -> Tensor:
        """Vectors `(B, L, width)` of a sequence's ids and, where these say so, latents."""
        vectors = self.others(sequence.ids)
        if sequence.latents is None:
            return vectors
        latent = (sequence.ids == int(Special.latent))[..., None]
        return torch.where(latent, self.enter(sequence.latents).to(vectors.dtype), vectors)

    def learn(self, states: Callable[[Sequence], Tensor], sequence: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step of training, and what to log. `states`: the hidden states of what the transformer sees."""
        return self.loss(states(sequence), sequence.latents, sequence.loss)

    def loss(self, hidden: Tensor, latents: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity of the tokens to predict, and what to log.

        Args:
            hidden: `(B, L, width)`; column i predicts the latent of column i + 1.
            latents: `(B, L, D)`. mask: `(B, L)` bool: which of them are to be predicted.
        """
        chosen = mask[:, 1:]
        return self.denoising(hidden[:, :-1][chosen], latents[:, 1:][chosen])

    def denoising(self, told: Tensor, clean: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of tokens `(N, D)` under hidden states `(N, width)`."""
        if not len(clean):
            raise ValueError("no token of this batch is to be predicted; its loss mask is empty")
        told, clean = told.repeat(self.repeats, 1), clean.repeat(self.repeats, 1)
        noise, time = torch.randn_like(clean), torch.rand(len(clean), device=clean.device)
        share, rest = (part[:, None] for part in cosines(time))
        velocity = self.denoiser(share * clean + rest * noise, time, told)
        loss = (velocity.float() - (share * noise - rest * clean)).square().mean()
        return loss, {"mse": loss.detach()}

    def sample(self, hidden: Tensor, sampling: TokenDenoising, noise: Callable[[], Tensor]) -> Tensor:
        """Tokens `(N, D)` under hidden states `(N, width)`; with guidance `(2 N, width)`, the second half without the
        condition.

        noise: gives new standard normal noise `(N, D)` each time.
        """
        copies = 1 if sampling.guidance == 1 else 2
        x = noise()
        times = torch.linspace(1, 0, sampling.steps + 1, device=x.device)
        for now, after in zip(times[:-1], times[1:], strict=True):
            velocity = self.denoiser(x.repeat(copies, 1), now.expand(copies * len(x)), hidden).float()
            if copies == 2:
                told, untold = velocity.chunk(2)
                velocity = torch.lerp(untold, told, sampling.guidance)
            (share, rest), (next_share, next_rest) = cosines(now), cosines(after)
            clean, noisy = share * x - rest * velocity, rest * x + share * velocity
            if after == 0:
                return clean
            # the posterior of arXiv:2006.11239, section 2: its variance is new noise, the rest the noise there was
            variance = (next_rest / rest).square() * (1 - (share / next_share).square())
            kept = (next_rest.square() - variance).clamp_min(0).sqrt()
            x = next_share * clean + kept * noisy + sampling.temperature * variance.sqrt() * noise()
        raise AssertionError("the last time is 0")


def draw_latents(
    transformer: Transformer,
    head: TokenDiffusion,
    sequence: Sequence,
    positions: Tensor,
    sampling: TokenDenoising = TokenDenoising(),
    unconditional: Sequence | None = None,
    generator: Generators = None,
    callback: Callable[[int, Tensor], None] | None = None,
    made: Tensor | None = None,
) -> Tensor:
    """Continues a sequence by continuous tokens, one by one: latents `(B, steps, D)`.

    The arguments are those of `decoding.generate`; the callback gets the newest latents `(B, D)`. made: latents
    `(B, n, D)` of a run that was interrupted, which comes to the same end.
    """
    batch, steps = len(sequence), positions.shape[-2]
    twin = None if unconditional is None else unconditional.replace(loss=None)
    current = with_twin(sequence.replace(loss=None), twin, sampling.guidance)
    copies = len(current) // batch
    positions = positions.expand(batch, steps, 3).repeat(copies, 1, 1)
    before = 0 if made is None else made.shape[1]
    done = [] if made is None else list(made.unbind(1))
    if before == steps:
        return made
    asked = torch.cat([current.positions[:, 1:], positions[:, : before + 1]], 1)
    if before:
        known = made.repeat(copies, 1, 1)
        ids = torch.full(known.shape[:2], int(Special.latent), device=positions.device)
        none = known.new_zeros(*current.ids.shape, head.channels)
        current = current.replace(
            ids=torch.cat([current.ids, ids], 1),
            positions=torch.cat([current.positions, positions[:, :before]], 1),
            latents=torch.cat([none if current.latents is None else current.latents, known], 1),
            interior=None,
        )
    current = current.replace(next_positions=asked)
    cache = transformer.new_cache(batch * copies, sequence.length + steps)

    def noise() -> Tensor:
        return normal((batch, head.channels), generator, positions.device)

    with torch.inference_mode():
        for _ in range(before * sampling.steps):  # the noise of those that are there
            noise()
        for step in range(before, steps):
            hidden = transformer(head.vectors(current), current, cache)
            done.append(head.sample(hidden[:, -1], sampling, noise))
            if callback is not None:
                callback(step + 1, done[-1])
            here, following = positions[:, step : step + 1], positions[:, step + 1 : step + 2]
            if step + 1 < steps:
                latents = done[-1].repeat(copies, 1)[:, None]
                ids = torch.full((batch * copies, 1), int(Special.latent), device=positions.device)
                current = Sequence(ids, here, prefix=0, next_positions=following, latents=latents)
    return torch.stack(done, 1)
