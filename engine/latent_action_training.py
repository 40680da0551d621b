"""Training of the latent action model."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from reelm.data.module import Batch
from reelm.data.tokens import TokenShards
from reelm.engine import store
from reelm.engine.optimisation import Optimisation
from reelm.evaluation.reconstruction import code_usage, psnr
from reelm.tokenizers.latent_actions import LatentActions


class LatentActionTraining(L.LightningModule):
    """Prediction of each next frame from those before it and a code of what happens (Genie, arXiv:2402.15391, section
    2.1).

    Args:
        actions: the model.
        optimisation: learning rate and schedule.
        commitment_weight: of the term that keeps what is named near its code.

    Logged as `val/dpsnr` is by how much the next frame is predicted better with the actions of the clip than with
    random ones, in dB (section 3).
    """

    metric = "val/dpsnr"

    def __init__(self, actions: LatentActions, optimisation: Optimisation, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.actions, self.optimisation, self.commitment_weight = actions, optimisation, commitment_weight
        self._seen: list[Tensor] = []

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.datamodule.train, TokenShards):
            raise ValueError("actions are learned from pixels and data=tokens holds none; name the clips themselves")

    def start_from(self, folder: str | Path) -> None:
        store.grow(self.actions, folder, "actions")

    def training_step(self, batch: Batch, _: int) -> Tensor:
        video, self.batch_keys = batch.clip.video, batch.clip.keys
        made, ids, terms = self.actions(video)
        error = (made.float() - self.actions.frames(video)[:, :, 1:]).square().mean()
        loss = error + self.commitment_weight * terms["commitment"]
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(video))
        self.log("train/codes", float(ids.unique().numel()), prog_bar=True, batch_size=len(video))
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        frames = self.actions.frames(batch.clip.video)
        made, ids, _ = self.actions(batch.clip.video)
        others = self.actions.predict(frames[:, :, :-1], torch.randint_like(ids, self.actions.codes))
        right, wrong = (psnr(x.float(), frames[:, :, 1:]).mean() for x in (made, others))
        size = len(frames)
        self._seen.append(ids.flatten().cpu())
        self.log("val/psnr", right, prog_bar=True, batch_size=size, sync_dist=True)
        self.log("val/dpsnr", right - wrong, prog_bar=True, batch_size=size, sync_dist=True)
        if index == 0:
            shown = torch.cat([frames[:4, :, :1], made[:4].float()], 2)
            self._samples = torch.stack([frames[:4], shown], 1).flatten(0, 1), batch.clip.fps / self.actions.stride

    def on_validation_epoch_end(self) -> None:
        used = code_usage(torch.cat(self._seen), self.actions.codes)["codes_used"]
        self._seen.clear()
        self.log("val/codes_used", float(used), sync_dist=True)

    def samples(self) -> tuple[Tensor, list[str], float]:
        """Clips and their frames predicted from those before, in turn, with labels, and the frame rate."""
        clips, fps = self._samples
        return clips, ["clip", "next frames"] * (len(clips) // 2), fps

    def export(self, folder: Path, step: int) -> None:
        store.save(self.actions, folder, notes={"step": step})

    def configure_optimizers(self) -> dict:
        return self.optimisation.configure(self, self.trainer.max_steps, inner=self.actions)
