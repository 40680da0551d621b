"""A denoiser and its objective as one model, with `loss` and `sample` side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reelm.diffusion.conditions import Conditions
from reelm.diffusion.objectives import Flow, Network
from reelm.diffusion.solvers import Denoising, Velocity, solve


class Diffusion(nn.Module):
    """Makes the latents of whole clips from noise.

    Args:
        denoiser: a network `(noisy, time, conditions) -> output`, such as `DiT`.
        objective: what its output means.
    """

    def __init__(self, denoiser: nn.Module, objective: Flow) -> None:
        super().__init__()
        self.denoiser, self.objective = denoiser, objective

    def network(self, conditions: Conditions) -> Network:
        """The denoiser under conditions. Frames that are kept are shown clean, and their time is 0."""

        def network(noisy: Tensor, time: Tensor) -> Tensor:
            if conditions.kept is not None:
                noisy = keep(noisy, conditions)
                time = time[:, None].masked_fill(conditions.kept, 0.0)
            return self.denoiser(noisy, time, conditions)

        return network

    def loss(self, clean: Tensor, conditions: Conditions) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean error over the latents `(B, D, t, h, w)` that are to be made, at random times, and what to log."""
        noise = torch.randn_like(clean)
        time = self.objective.times(len(clean), clean.device)
        errors = self.objective.loss(self.network(conditions), clean, noise, time)
        if conditions.kept is not None:
            made = (~conditions.kept)[:, None, :, None, None].expand_as(errors)
            errors = errors[made]
            if not len(errors):
                raise ValueError("all latent frames are known; nothing is left to make")
        loss = errors.mean()
        return loss, {"mse": loss.detach()}

    def sample(
        self,
        noise: Tensor,
        conditions: Conditions,
        denoising: Denoising = Denoising(),
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Latents `(B, D, t, h, w)` made of noise of that shape; callback: see `solve`."""
        velocity = self._guided(conditions, denoising.guidance)
        times = self.objective.schedule(denoising.steps, noise.device)
        return keep(solve(velocity, noise, times, denoising.solver, callback), conditions)

    def _guided(self, conditions: Conditions, scale: float) -> Velocity:
        """Classifier-free guidance (arXiv:2207.12598), both halves as one batch."""
        if scale == 1 or not conditions.prompted:
            return lambda x, time: self.objective.velocity(self.network(conditions), x, time)
        both = self.network(Conditions.cat([conditions, conditions.without_text()]))

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            told, untold = self.objective.velocity(both, x.repeat(2, 1, 1, 1, 1), time.repeat(2)).chunk(2)
            return torch.lerp(untold, told, scale)

        return velocity


def keep(latents: Tensor, conditions: Conditions) -> Tensor:
    """The latents with those frames that are kept as they are known."""
    if conditions.kept is None:
        return latents
    return torch.where(conditions.kept[:, None, :, None, None], conditions.known.to(latents.dtype), latents)
