"""From noise to latents: solvers are functions of a velocity and of times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class Denoising:
    """How to denoise.

    steps: of the solver. solver: "euler", or "heun", which asks the network twice a step and errs less.
    guidance: scale of classifier-free guidance; 1: none.
    """

    steps: int = 32
    solver: Literal["euler", "heun"] = "euler"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is 1 or more; got {self.steps}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is one of {', '.join(SOLVERS)}; got {self.solver}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is a number from 0 on (1: none); got {self.guidance}")


def solve(
    velocity: Velocity,
    noise: Tensor,
    times: Tensor,
    solver: str = "euler",
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Follows a velocity from `noise (B, ...)` at `times[0]` to `times[-1]`.

    Args:
        velocity: of latents and times `(B,)`.
        solver: "euler" is what diffusers' `FlowMatchEulerDiscreteScheduler` does. "heun" averages the velocities at
            both ends of a step but the last, whose end is clean (arXiv:2206.00364, algorithm 1).
        callback: called with the number of steps made and the latents after each step.
    """
    x = noise
    for step, (now, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        slope = velocity(x, now.expand(len(x)))
        if solver == "heun" and step + 2 < len(times):
            slope = (slope + velocity(x + (after - now) * slope, after.expand(len(x)))) / 2
        x = x + (after - now) * slope
        if callback is not None:
            callback(step + 1, x)
    return x
