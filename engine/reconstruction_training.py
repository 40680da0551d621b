"""What the training of all tokenizers has in common: two players, one model folder, codes that are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from reelm.engine import store
from reelm.engine.optimisation import Optimisation
from reelm.evaluation.reconstruction import code_usage

ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda error: error.square().mean(),
    "l1": lambda error: error.abs().mean(),
    "psnr": lambda error: error.square().flatten(1).mean(1).clamp_min(1e-8).log().mean(),
}


class ReconstructionTraining(L.LightningModule):
    """A tokenizer learns to reconstruct, with an adversary where one is given.

    Subclasses have `folder`, the sub-folder of a whole model that holds their tokenizer; `signal`, the name of what is
    reconstructed; and `rival`, the class of an adversary that fits.

    Args:
        tokenizer: the model.
        optimisation: learning rate and schedule.
        adversary: trained along, or None. It is called with (reconstruction, original), returns a loss for both players
            and named terms, and has `lr` and `betas`.
        reconstruction: of ERRORS, what is minimised of (reconstruction - original).
    """

    folder: str
    signal: str
    rival: type[nn.Module]

    def __init__(
        self, tokenizer: nn.Module, optimisation: Optimisation, adversary: nn.Module | None, reconstruction: str
    ) -> None:
        super().__init__()
        if adversary is not None and not isinstance(adversary, self.rival):
            raise ValueError(
                f"the adversary is {type(adversary).__name__} and {self.signal} takes {self.rival.__name__}; "
                "choose another adversary=..."
            )
        if reconstruction not in ERRORS:
            raise ValueError(f"reconstruction is one of {', '.join(ERRORS)}; got {reconstruction}")
        self.tokenizer, self.optimisation, self.adversary = tokenizer, optimisation, adversary
        self.reconstruction = reconstruction
        self._seen: list[Tensor] = []

    def start_from(self, folder: str | Path) -> None:
        """Begins with the weights of an exported model, which may be smaller than this one."""
        store.grow(self.tokenizer, folder, self.folder)

    def with_adversary(self, loss: Tensor, terms: dict[str, Tensor], made: Tensor, true: Tensor) -> Tensor:
        """The loss with the adversary's terms, which are added to the named ones."""
        if self.adversary is None:
            return loss
        total, named = self.adversary(made, true)
        terms |= named
        return loss + total

    def seen(self) -> Tensor:
        """The ids of this validation, which are then forgotten."""
        ids = torch.cat(self._seen)
        self._seen.clear()
        return ids

    def log_usage(self, ids: Tensor, name: str = "") -> int:
        """Logs which codes occur, and how evenly; returns how many."""
        usage = code_usage(ids, self.tokenizer.vocabulary)
        self.log(f"val/codes_used{name}", float(usage["codes_used"]), sync_dist=True)
        self.log(f"val/perplexity{name}", usage["perplexity"], sync_dist=True)
        return usage["codes_used"]

    def export(self, folder: Path, step: int) -> None:
        store.save(self.tokenizer, folder, notes={"step": step})

    def configure_optimizers(self) -> dict:
        apart = []
        if self.adversary is not None:
            player = {"lr": self.adversary.lr, "betas": self.adversary.betas}
            apart = [{"params": list(self.adversary.parameters()), **player}]
        return self.optimisation.configure(self, self.trainer.max_steps, inner=self.tokenizer, apart=apart)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Each player's gradients by themselves, so that neither's norm scales the other's."""
        if self.adversary is None or not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for player in (self.tokenizer, self.adversary):
            nn.utils.clip_grad_norm_(player.parameters(), gradient_clip_val)
