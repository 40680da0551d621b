"""What a denoiser learns: how clean latents become noise, what the network predicts on the way, and how to get back.

An objective has `times`, `loss`, `velocity` and `schedule`; models and solvers know no more of it. Time runs from 0
(clean) to 1 (noise). A network is a function `(noisy, time (B,)) -> output`, so that an objective may scale what goes
in and what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


def over(time: Tensor, like: Tensor) -> Tensor:
    """Times `(B,)` that can be multiplied with `like (B, ...)`."""
    return time.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Flow:
    """Rectified flow, or flow matching along straight lines (arXiv:2209.03003, arXiv:2210.02747).

    Latents move from clean to noise at constant speed, `x_t = (1 - t) clean + t noise`, and the network predicts the
    velocity `noise - clean`.

    drawn: how training draws times, "logit_normal" (arXiv:2403.03206, section 3.1) or "uniform".
    mean, std: of the normal distribution whose sigmoid is drawn.
    shift: moves times towards noise, as large clips need it (the same, section 5.3.2); 1: not.
    """

    drawn: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.drawn not in ("logit_normal", "uniform"):
            raise ValueError(f"times are drawn logit_normal or uniform; got {self.drawn}")
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std and shift are more than 0; got {self.std} and {self.shift}")

    def times(self, count: int, device: torch.device | str | None = None) -> Tensor:
        """Times `(count,)` to train at, spread evenly over their distribution (arXiv:2107.00630, appendix I.1)."""
        places = torch.arange(count, device=device) + torch.rand(count, device=device)
        even = (places / count)[torch.randperm(count, device=device)].clamp(1e-6, 1 - 1e-6)
        if self.drawn == "logit_normal":
            even = torch.sigmoid(self.mean + self.std * torch.special.ndtri(even))
        return self._shifted(even)

    def _shifted(self, time: Tensor) -> Tensor:
        return self.shift * time / (1 + (self.shift - 1) * time)

    def loss(self, network: Network, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Squared errors, of the shape of `clean`, float32."""
        output = network(torch.lerp(clean, noise, over(time, clean)), time)
        return (output.float() - (noise - clean).float()).square()

    def velocity(self, network: Network, noisy: Tensor, time: Tensor) -> Tensor:
        """How latents change with time, which solvers follow back from noise."""
        return network(noisy, time).to(noisy.dtype)

    def schedule(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """Times `(steps + 1,)` from 1 to 0 at which a solver stands."""
        return self._shifted(torch.linspace(1, 0, steps + 1, device=device))
