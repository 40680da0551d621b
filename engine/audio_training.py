"""Training of the audio tokenizer."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from reelm.data.module import Batch, Group
from reelm.engine.optimisation import Optimisation
from reelm.engine.reconstruction_training import ERRORS, ReconstructionTraining
from reelm.evaluation.sound import mel_distance, picture, pitch_kept, si_sdr, snr
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.audio_discriminator import SoundAdversary
from reelm.tokenizers.spectral import SpectralLoss

FEW = 0.1  # a level of which a validation sees a smaller share of the codes than this is mostly idle


class AudioTraining(ReconstructionTraining):
    """Waveform, spectral and commitment terms, and an adversary where one is given (SoundStream, section III.E).

    Args:
        tokenizer: a `SoundStream`; its rate is the rate at which sounds are read.
        optimisation: learning rate and schedule.
        adversary: a `reelm.tokenizers.audio_discriminator.SoundAdversary`, trained along, or None.
        reconstruction_weight, spectral_weight, commitment_weight: of the loss terms.
        reconstruction: "l1", "l2", or "psnr": the logarithm of each sound's L2, so that loud and soft ones count alike.
        emphasis: the waveform term compares x[n] - emphasis * x[n - 1], so that what is soft and high, such as a click
            over a low voice, counts. A spectral term alone hardly finds it: where nothing sounds, no phase is right.
        windows: of the spectral loss, in samples. floor: amplitude below which it hears nothing.
    """

    metric = "val/snr"  # what a sweep optimises
    folder, signal, rival = "audio", "sound", SoundAdversary

    def __init__(
        self,
        tokenizer: SoundStream,
        optimisation: Optimisation,
        adversary: SoundAdversary | None = None,
        reconstruction_weight: float = 1.0,
        spectral_weight: float = 1.0,
        commitment_weight: float = 1.0,
        reconstruction: Literal["l1", "l2", "psnr"] = "l1",
        emphasis: float = 0.0,
        windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048),
        floor: float = 1e-4,
    ) -> None:
        super().__init__(tokenizer, optimisation, adversary, reconstruction)
        self.spectral = SpectralLoss(tokenizer.rate, windows, floor=floor)
        self.emphasis = emphasis
        self.weights = {
            "reconstruction": reconstruction_weight,
            "spectral": spectral_weight,
            "commitment": commitment_weight,
        }

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        for source in (data.train, data.validation):
            if not hasattr(source, "sound"):
                raise ValueError(f"an audio tokenizer is trained on sound and {type(source).__name__} holds none")
        data.groups = (Group("sound", sound=self.tokenizer.rate),)

    def losses(self, sound: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Named, unweighted terms; the reconstruction; the ids."""
        reconstruction, ids, terms = self.tokenizer(sound)
        reconstruction = reconstruction.float()
        error = reconstruction - sound
        if self.emphasis:
            error = error[..., 1:] - self.emphasis * error[..., :-1]
        terms["reconstruction"] = ERRORS[self.reconstruction](error)
        terms["spectral"] = self.spectral(reconstruction, sound)
        return terms, reconstruction, ids

    def training_step(self, batch: Batch, _: int) -> Tensor:
        sound, self.batch_keys = self.tokenizer.mixed(batch.clip.audio), batch.clip.keys
        terms, reconstruction, ids = self.losses(sound)
        loss = sum(self.weights[name] * value for name, value in terms.items())
        loss = self.with_adversary(loss, terms, reconstruction, sound)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, batch_size=len(sound))
        self.log("train/loss", loss.detach(), batch_size=len(sound))
        self.log("train/snr", snr(reconstruction.detach(), sound).mean(), prog_bar=True, batch_size=len(sound))
        self.log("train/codes", float(ids[..., 0].unique().numel()), prog_bar=True, batch_size=len(sound))
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        sound, rate = self.tokenizer.mixed(batch.clip.audio), self.tokenizer.rate
        reconstruction, ids, _ = self.tokenizer(sound)
        reconstruction = reconstruction.float().clamp(-1, 1)
        self._seen.append(ids.flatten(0, 1).cpu())
        figures = {
            "snr": snr(reconstruction, sound),
            "si_sdr": si_sdr(reconstruction, sound),
            "mel_distance": mel_distance(reconstruction, sound, rate),
            "pitch_kept": pitch_kept(reconstruction, sound, rate).float(),
        }
        for name, values in figures.items():
            self.log(f"val/{name}", values.mean(), prog_bar=name == "snr", batch_size=len(sound), sync_dist=True)
        if index == 0:
            both = torch.stack([sound[:4], reconstruction[:4]], 1).flatten(0, 1)
            self._samples = picture(both)

    def on_validation_epoch_end(self) -> None:
        ids = self.seen()
        for level, each in enumerate(ids.unbind(-1)):
            used = self.log_usage(each, f"_{level}")
            if used < FEW * min(self.tokenizer.vocabulary, len(each)):
                rank_zero_warn(
                    f"level {level} uses {used} of its {self.tokenizer.vocabulary} codes for {len(each)} latents of "
                    "the validation; lower the learning rate, or raise quantizer.dead so that idle codes are replaced"
                )

    def samples(self) -> tuple[Tensor, list[str], float]:
        """Spectrograms of sounds and reconstructions in turn, with labels, and the frame rate."""
        return self._samples, ["sound", "reconstruction"] * (len(self._samples) // 2), 1.0
