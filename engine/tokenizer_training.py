"""Training of the video tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from reelm.data.module import Batch
from reelm.data.tokens import TokenShards
from reelm.engine import store
from reelm.engine.optimisation import Optimisation
from reelm.engine.reconstruction_training import ERRORS, ReconstructionTraining
from reelm.evaluation.reconstruction import psnr
from reelm.tokenizers.discriminator import Adversary


class TokenizerTraining(ReconstructionTraining):
    """Reconstruction, commitment and entropy terms (MAGVIT-v2, appendix A.2), and a perceptual term and an adversary
    where they are given.

    Args:
        tokenizer: the model, such as `MAGVIT2`.
        optimisation: learning rate and schedule.
        perceptual: a module `(video, target) -> scalar` such as `reelm.tokenizers.perceptual.LPIPS`, or None.
        adversary: a `reelm.tokenizers.discriminator.Adversary`, trained along, or None.
        reconstruction_weight, commitment_weight, entropy_weight, kl_weight, perceptual_weight: of the loss terms.
        entropy_boost, entropy_steps: the entropy terms begin with `1 + entropy_boost` times their weight, which falls
            to the weight itself over these steps; the paper has 3 and 2,000.
        reconstruction: "l2", "l1", or "psnr": the logarithm of each clip's L2, so that easy and hard clips count alike.
        frames: trains on a random part of each clip, of this many frames; None: on whole clips.
        part: "decoder" keeps the encoder as it is: the tokens stay the same, and what was trained on them stays right.
    """

    metric = "val/psnr"  # what a sweep optimises
    folder, signal, rival = "tokenizer", "video", Adversary

    def __init__(
        self,
        tokenizer: nn.Module,
        optimisation: Optimisation,
        perceptual: nn.Module | None = None,
        adversary: Adversary | None = None,
        reconstruction_weight: float = 5.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        kl_weight: float = 1e-5,
        perceptual_weight: float = 0.1,
        entropy_boost: float = 0.0,
        entropy_steps: int = 2000,
        reconstruction: Literal["l2", "l1", "psnr"] = "l2",
        frames: int | None = None,
        part: Literal["all", "decoder"] = "all",
    ) -> None:
        super().__init__(tokenizer, optimisation, adversary, reconstruction)
        self.perceptual = perceptual
        self.weights = {
            "reconstruction": reconstruction_weight,
            "commitment": commitment_weight,
            "sample_entropy": entropy_weight,
            "batch_entropy": -entropy_weight,
            "kl": kl_weight,
            "perceptual": perceptual_weight,
        }
        self.entropy_boost, self.entropy_steps = entropy_boost, entropy_steps
        if part not in ("all", "decoder"):
            raise ValueError(f"part is all or decoder; got {part}")
        if entropy_steps < 1:
            raise ValueError(f"entropy_steps={entropy_steps} must be 1 or more; entropy_boost=0 turns the boost off")
        self.frames, self.part = frames, part
        self._begun = part == "all"  # a decoder of a random encoder would be of no use
        if part == "decoder":
            if "decoder" not in getattr(tokenizer, "decoding_only", ()):
                raise ValueError(
                    f"the tokens of {type(tokenizer).__name__} depend on its decoder too; train it with stage.part=all"
                )
            tokenizer.eval().requires_grad_(False)  # eval: the codes of a vector quantizer follow what they stand for
            tokenizer.decoder.train().requires_grad_(True)
        self._flat: dict[str, list[Tensor]] = {"train": [], "validation": []}

    def start_from(self, folder: str | Path) -> None:
        super().start_from(folder)
        found = store.part_of(folder, self.folder)
        if self.part == "decoder" and store.fingerprint(self.tokenizer) != store.fingerprint(store.load(found)):
            raise ValueError(
                f"stage.part=decoder keeps the tokens, but {found} has another encoder or quantizer than is set here; "
                "give the same tokenizer=... and quantizer=..."
            )
        self._begun = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._begun = True

    def on_fit_start(self) -> None:
        if not self._begun:
            raise ValueError("stage.part=decoder goes on from a trained tokenizer; name its folder by init=...")

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.datamodule.train, TokenShards):
            raise ValueError("a tokenizer is trained on pixels and data=tokens holds none; name the clips themselves")

    def losses(self, video: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Named, unweighted terms; the reconstruction; the tokens."""
        reconstruction, tokens, terms = self.tokenizer(video)
        reconstruction = reconstruction.float()
        terms["reconstruction"] = ERRORS[self.reconstruction](reconstruction - video)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, video)
        return terms, reconstruction, tokens

    def training_step(self, batch: Batch, _: int) -> Tensor:
        video, self.batch_keys = batch.clip.video, batch.clip.keys
        if self.frames is not None and self.frames < video.shape[2]:
            start = int(torch.randint(video.shape[2] - self.frames + 1, ()))
            video = video[:, :, start : start + self.frames]
        self._flat["train"].append(flat(video))
        terms, reconstruction, tokens = self.losses(video)
        boost = 1 + self.entropy_boost * max(0.0, 1 - self.global_step / self.entropy_steps)
        loss = sum(
            self.weights[name] * value * (boost if name.endswith("_entropy") else 1) for name, value in terms.items()
        )
        loss = self.with_adversary(loss, terms, reconstruction, video)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(video))
        self.log("train/loss", loss.detach(), batch_size=len(video))
        self.log("train/psnr", psnr(reconstruction.detach(), video).mean(), prog_bar=True, batch_size=len(video))
        if self.tokenizer.vocabulary is not None:
            self.log("train/codes", float(tokens.unique().numel()), prog_bar=True, batch_size=len(video))
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        video = batch.clip.video
        reconstruction, tokens, _ = self.tokenizer(video)
        self._seen.append(tokens.flatten().cpu())
        self._flat["validation"].append(flat(video))
        self.log("val/psnr", psnr(reconstruction, video).mean(), prog_bar=True, batch_size=len(video), sync_dist=True)
        if index == 0:
            self._rate = batch.clip.fps
            self._samples = torch.stack([video[:4], reconstruction[:4].float().clamp(-1, 1)], 1).flatten(0, 1)

    def on_validation_epoch_end(self) -> None:
        tokens = self.seen()
        for name, parts in self._flat.items():
            share = float(torch.cat(parts).float().mean()) if parts else 0.0
            parts.clear()
            if share > 0.5:
                rank_zero_warn(
                    f"{share:.0%} of the {name} clips since the last validation show one colour alone, or nearly; "
                    "nothing can be learned from them: look at the files and at what reads them"
                )
        if self.tokenizer.vocabulary is None:
            self.log("val/latent_std", tokens.std(), sync_dist=True)  # 1 where the running statistics have followed
            return
        digits = getattr(self.tokenizer.quantizer, "digits", (self.tokenizer.vocabulary,))
        if idle := idle_digits(tokens, digits):
            what = "bits" if set(digits) == {2} else "digits"
            rank_zero_warn(
                f"{what} {idle} of the codes are much the same in all validation tokens, so part of the codebook is "
                "idle; look whether the clips in samples/ show anything, and lower the learning rate or, with "
                "lookup-free quantization, raise entropy_weight"
            )
        self.log_usage(tokens)

    def samples(self) -> tuple[Tensor, list[str], float] | None:
        """Clips and reconstructions in turn, with labels, and the frame rate."""
        return self._samples, ["clip", "reconstruction"] * (len(self._samples) // 2), self._rate


def flat(video: Tensor) -> Tensor:
    """Which clips `(B, 3, T, H, W)` hardly vary: by less than one level of 8 bits, in standard deviation: `(B,)`."""
    return video.detach().flatten(1).std(1) < 2 / 255


def idle_digits(ids: Tensor, digits: Sequence[int], share: float = 0.01, used: float = 0.05) -> list[int]:
    """Digits of the ids, counted from the lowest, that tell hardly anything.

    One value stands in all tokens but less than `share` of them, or the perplexity of the values is less than `used` of
    what it could be with so many values and tokens (which only codebooks of more than 20 codes can fall below).
    digits: how many values each can have.
    """
    idle = []
    for place, values in enumerate(digits):
        counts = torch.bincount(ids.flatten() % values)
        ids = ids // values
        parts = counts[counts > 0] / counts.sum()
        perplexity = float((-(parts * parts.log()).sum()).exp())
        if parts.max() > 1 - share or perplexity < used * min(values, int(counts.sum())):
            idle.append(place)
    return idle
