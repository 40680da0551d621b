"""`VideoDiffusion`: tokenizer, text model and a denoiser of whole clips joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.diffusion.model import Diffusion
from reelm.diffusion.solvers import Denoising
from reelm.engine.video_model import VideoModel
from reelm.lm.sampling import seeded
from reelm.tasks.conditioning import Conditioner
from reelm.tasks.formats import Formats
from reelm.tasks.task import Given, Task
from reelm.tokenizers.text import SentencePieceText, T5Text


class VideoDiffusion(VideoModel):
    """A model that makes whole clips by denoising their latents.

    Args:
        tokenizer: of video; it stays frozen.
        text: the text model.
        diffusion: denoiser and objective.
        tasks: what the model was trained to do, by name.
        shape: frames, height and width of its clips. fps: their rate.
        sampling: how it samples where nothing else is asked for.
        formats: as for all `VideoModel`s; it is told the rate, and sees size and length.
    """

    noun, part, kind = "video diffusion model", "diffusion", Denoising

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        diffusion: Diffusion,
        tasks: Mapping[str, Task],
        shape: tuple[int, int, int] = (17, 64, 64),
        fps: float = 8.0,
        sampling: Denoising = Denoising(),
        formats: Formats | None = None,
    ) -> None:
        super().__init__(tokenizer, text, tasks, shape, fps, sampling, formats)
        self.diffusion = diffusion
        self.packer = Conditioner(tokenizer, text)

    def loss(self, clip: Clip, task: str, unprompted: Tensor | bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        given, target = self.task(task).split(clip)
        with torch.no_grad():
            space = self.packer.space
            latents = space.encode(target.video) if target.tokens is None else space.points(target.tokens)
            conditions = self.packer.conditions(given, latents, unprompted)
        return self.diffusion.loss(latents, conditions)

    @torch.inference_mode()
    def generate(
        self,
        given: Given | str | list[str],
        task: str = "t2v",
        sampling: Denoising | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Clip:
        """Clips for what is given: a prompt, several, or a `Given` with known pixels or a condition.

        seed: the noise of sample i is drawn with seed + i. progress: called with steps made and steps asked.
        """
        given, sampling = self._given(given, task), self._sampling(sampling, Denoising)
        space = self.packer.space
        shape = (space.channels, *self.packer.grid(given))
        noise = [torch.randn(shape, generator=one) for one in seeded([seed + i for i in range(len(given))])]
        latents = self.diffusion.sample(
            torch.stack(noise).to(self.device),
            self.packer.conditions(given),
            sampling,
            callback=None if progress is None else lambda step, _: progress(step, sampling.steps),
        )
        return Clip(space.decode(latents), given.fps, given.captions)
