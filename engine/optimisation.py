"""Optimiser and learning-rate schedule, as one small object that both training stages share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def schedule_factor(kind: str, warmup: int, total: int, cooldown: float, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate at each step.

    "cosine": linear warm-up, then half a cosine down to `floor`. "wsd": warm-up, stable, then a linear decay to `floor`
    over the last `cooldown` share of the steps, so that a run can be prolonged from its stable part. "constant": warm-up.
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


class Joined(torch.optim.Optimizer):
    """Several optimisers over disjoint parameters that step, save and load as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        # the inner optimisers made new group dicts; a scheduler that changes ours must change theirs
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class Optimisation:
    """How to optimise.

    Args:
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon on the weight matrices of linear layers (0: AdamW for everything). Muon
            needs clearly fewer steps on small transformers; embeddings, norms and heads stay with AdamW.
        warmup: steps of linear warm-up.
        schedule: "cosine", "wsd" or "constant".
    """

    def __init__(
        self,
        lr: float = 1e-3,
        muon_lr: float = 0.0,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: int = 100,
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        cooldown: float = 0.3,
        floor: float = 0.02,
    ) -> None:
        if schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"schedule is cosine, wsd or constant; got {schedule}")
        self.lr, self.muon_lr, self.weight_decay, self.betas = lr, muon_lr, weight_decay, tuple(betas)
        self.warmup, self.schedule, self.cooldown, self.floor = warmup, schedule, cooldown, floor

    def configure(self, module: nn.Module, total_steps: int, matrices: nn.Module | None = None) -> dict[str, Any]:
        """Lightning's `configure_optimizers` answer; Muon takes the 2-D weights found in `matrices`."""
        muon = []
        if self.muon_lr and matrices is not None:
            muon = [m.weight for m in matrices.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        chosen = {id(p) for p in muon}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, self.lr, self.betas, fused=True)
        if muon:
            spectral = torch.optim.Muon(muon, self.muon_lr, self.weight_decay, adjust_lr_fn="match_rms_adamw")
            optimizer = Joined([optimizer, spectral])
        factor = schedule_factor(self.schedule, self.warmup, total_steps, self.cooldown, self.floor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
