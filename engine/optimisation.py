"""Optimiser and learning-rate schedule, as one small object that both training stages share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def schedule_factor(kind: str, warmup: int, total: int, cooldown: float, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate at each step.

    "cosine": linear warm-up, then half a cosine down to `floor`. "wsd": warm-up, stable, then a linear decay to `floor`
    over the last `cooldown` share of the steps, so that a run can be prolonged from its stable part. "constant":
    warm-up alone.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if kind == "constant":
            return 1.0
        if kind == "cosine":
            progress = min((step - warmup) / max(total - warmup, 1), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        start = total - max(int(total * cooldown), 1)
        return 1.0 - (1 - floor) * min(max(step - start, 0) / max(total - start, 1), 1.0)

    return factor


def orthogonalised(gradients: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by a quintic Newton-Schulz iteration in bfloat16 (Muon).

    Of `(..., rows, columns)`; many small matrices together take little more than half the time of one by one.
    """
    x = gradients.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and in groups with `momentum` Muon (Jordan et al. 2024): momentum whose every update is orthogonalised.

    Unlike `torch.optim.Muon` it takes convolutions too, as matrices of output channels by the rest. Updates are
    scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate suits both.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # before the groups are parted: it zeroes and fills the gradients of all of them
            with torch.enable_grad():
                loss = closure()
        everything, spectral = self.param_groups, [g for g in self.param_groups if g["momentum"]]
        try:
            self.param_groups = [g for g in everything if not g["momentum"]]
            super().step()
        finally:
            self.param_groups = everything
        for group in spectral:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())  # AdamW asks each state for one when it loads
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"].mul_(group["momentum"]).add_(parameter.grad)
                direction = parameter.grad.add(average, alpha=group["momentum"]).flatten(1)
                alike.setdefault(direction.shape, []).append((parameter, direction))
            for shape, pairs in alike.items():
                updates = orthogonalised(torch.stack([direction for _, direction in pairs]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
        return loss


class Optimisation:
    """How to optimise.

    Args:
        lr: peak learning rate.
        muon: Muon for the weight matrices and convolutions inside the network, which needs clearly fewer steps on small
            models; embeddings, norms and heads stay with AdamW.
        weight_decay: of matrices; vectors have none. betas: of AdamW.
        warmup: steps of linear warm-up.
        schedule: "cosine", "wsd" or "constant". cooldown: share of the steps in which "wsd" decays. floor: where
            a decay ends, as a share of `lr`.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        muon: bool = False,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: int = 100,
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        cooldown: float = 0.3,
        floor: float = 0.02,
    ) -> None:
        if schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule is cosine, wsd or constant; got {schedule}")
        self.lr, self.muon, self.weight_decay, self.betas = lr, muon, weight_decay, tuple(betas)
        self.warmup, self.schedule, self.cooldown, self.floor = warmup, schedule, cooldown, floor

    def configure(
        self,
        module: nn.Module,
        total_steps: int,
        inner: nn.Module | None = None,
        apart: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """Lightning's `configure_optimizers` answer; Muon takes the matrices found in `inner`.

        apart: parameter groups with settings of their own, such as a discriminator's; AdamW takes them.
        """
        if total_steps < 1 and self.schedule != "constant":
            raise ValueError(f"the schedule {self.schedule} needs an end; set trainer.max_steps, or schedule=constant")
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        inside = inner.modules() if self.muon and inner is not None else ()
        matrices = [m.weight for m in inside if isinstance(m, kinds) and m.weight.requires_grad]
        chosen = {id(p) for p in matrices} | {id(p) for group in apart for p in group["params"]}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": self.weight_decay, "momentum": 0.0},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "momentum": 0.0},
            {"params": matrices, "weight_decay": self.weight_decay, "momentum": 0.95},
            *({"weight_decay": 0.0, "momentum": 0.0} | group for group in apart),
        ]
        optimizer = MuonAdamW([group for group in groups if group["params"]], self.lr, self.betas)
        factor = schedule_factor(self.schedule, self.warmup, total_steps, self.cooldown, self.floor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
