"""Training of models that denoise whole clips, on a mixture of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from reelm.data.module import Batch
from reelm.diffusion.model import Diffusion
from reelm.diffusion.objectives import Flow
from reelm.diffusion.solvers import Denoising
from reelm.engine.model_training import ModelTraining
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.tasks.formats import Format
from reelm.tasks.task import Mixture, Task
from reelm.tokenizers.latents import LatentSpace
from reelm.tokenizers.text import SentencePieceText, T5Text


class DiffusionTraining(ModelTraining):
    """Denoising of everything that the tasks ask for.

    Args:
        tokenizer: folder of a trained video tokenizer; it stays frozen.
        denoiser: the network, as a function of the latents' channels, the frames of a latent, the word pieces and the
            size of embedded text (`functools.partial` of `DiT`).
        objective: what it learns, such as `Flow`.
        task: a task or a mixture of them.
        optimisation: learning rate and schedule.
        text: a trained text model, or the number of word pieces of one to be trained on the captions.
        text_drop: share of prompts left out, for classifier-free guidance.
        compile: let torch compile the blocks (half a minute at the start, and a C++ compiler on CPUs; faster steps).
        checkpointing: keep of each block only what goes in and compute the rest again in the backward pass: less
            memory, about a third more work.
        sampling: with which samples are drawn to be looked at, and which the saved model has by default.
        formats: lengths, sizes and rates to train on together, the usual one first; None: the data's own alone.
    """

    made, measure = VideoDiffusion, "mse"

    def __init__(
        self,
        tokenizer: str | Path,
        denoiser: Callable[..., nn.Module],
        objective: Flow,
        task: Task | Mixture,
        optimisation: Optimisation,
        text: SentencePieceText | T5Text | int = 1024,
        text_drop: float = 0.1,
        compile: bool = False,
        checkpointing: bool = False,
        sampling: Denoising = Denoising(),
        formats: Sequence[Format] | None = None,
    ) -> None:
        super().__init__(tokenizer, task, optimisation, text, text_drop, compile, checkpointing, sampling, formats)
        video = self.video_tokenizer[0]
        network = denoiser(
            channels=LatentSpace(video).channels,
            frames=video.compression[0],
            pieces=self.pieces,
            text_width=getattr(self.text[0], "width", 0),
        )
        self.diffusion = Diffusion(network, objective)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch.clip, batch.name, self.dropped(len(batch.clip)))

    @property
    def network(self) -> nn.Module:
        return self.diffusion.denoiser

    def configure_optimizers(self) -> dict:
        return self.optimisation.configure(self, self.trainer.max_steps, inner=self.diffusion.denoiser.blocks)
