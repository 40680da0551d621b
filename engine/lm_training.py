"""Training of the video language model on a mixture of tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reelm.data.module import Batch
from reelm.data.tokens import TokenShards
from reelm.engine import store
from reelm.engine.model_training import ModelTraining
from reelm.engine.optimisation import Optimisation
from reelm.engine.reinforcement import Reinforcement
from reelm.engine.video_lm import VideoLM, check_actions
from reelm.lm.audio_visual import AudioVisual
from reelm.lm.heads import Head
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling
from reelm.lm.masked_diffusion import MaskedDenoising, MaskedTokenDiffusion
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion
from reelm.lm.vocabulary import Vocabulary
from reelm.lm.weighting import Weighting
from reelm.tasks.formats import Format
from reelm.tasks.task import Mixture, Task
from reelm.tokenizers.latents import LatentSpace
from reelm.tokenizers.text import SentencePieceText, T5Text


class LMTraining(ModelTraining):
    """Next-token prediction over everything that the tasks ask for.

    Args:
        tokenizer: folder of a trained video tokenizer; it stays frozen.
        lm: the transformer.
        head: how tokens are predicted, as a function of the vocabulary and the width (`functools.partial` of a head).
        task: a task or a mixture of them.
        optimisation: learning rate and schedule.
        text: a trained text model, or the number of word pieces of one to be trained on the captions.
        text_drop: share of prompts left out, for classifier-free guidance; also of the sounds and clips that a clip or
            its sound is made from.
        compile: let torch compile the blocks (half a minute at the start, and a C++ compiler on CPUs; faster steps).
        checkpointing: keep of each block only what goes in and compute the rest again in the backward pass: less
            memory, about a third more work.
        only: a regular expression for the names of the parameters that learn, such as "temporal|gate" of a dual-channel
            layout whose first channel comes from an image model (`init`); None: all.
        sampling: with which samples are drawn to be looked at, and which the saved model has by default. Of a way to
            draw ids, temperature and guidance hold for masked and for continuous tokens too.
        formats: lengths, sizes and rates to train on, told by tokens, the usual one first; None: the data's own alone.
        audio: folder of a trained audio tokenizer, for tasks with sound; it stays frozen.
        frame_weights, level_weights, onset, prompt_weight: how much the codes of a clip's first latent frames, those of
            each level of sound, the first of a sound, and those that the prompt tells count in the loss (`Weighting`).
            `train/loss` is with these weights, what is logged of each task without.
        pack: put the clips of a step into one row, one after the other, so that prompts are not filled up to the
            longest (lm/packed.py). Best with lm.attention=flash.
        actions: folder of a trained latent action model, whose codes of the clips are told to a masked head (Genie); it
            stays frozen.
        reinforcement: learn also from a reward for clips that the model makes of what its batches give; None: not. For
            a model that was trained before (`init`).
    """

    made = VideoLM

    def __init__(
        self,
        tokenizer: str | Path,
        lm: nn.Module,
        head: Callable[[Vocabulary, int], Head],
        task: Task | Mixture,
        optimisation: Optimisation,
        text: SentencePieceText | T5Text | int = 1024,
        text_drop: float = 0.1,
        compile: bool = False,
        checkpointing: bool = False,
        only: str | None = None,
        sampling: Sampling | TokenDenoising = Sampling(),
        formats: Sequence[Format] | None = None,
        audio: str | Path | None = None,
        frame_weights: Sequence[float] | None = None,
        level_weights: Sequence[float] | None = None,
        onset: float = 1.0,
        prompt_weight: float = 0.0,
        pack: bool = False,
        actions: str | Path | None = None,
        reinforcement: Reinforcement | None = None,
    ) -> None:
        if head is None:
            raise ValueError("head=dit_flow is no head of the language model: leave stage=lm out or choose another")
        kind = getattr(head, "func", head)
        continuous = kind in (TokenDiffusion, MaskedTokenDiffusion)
        if continuous and isinstance(sampling, Sampling):
            draws = MaskedDenoising if kind is MaskedTokenDiffusion else TokenDenoising
            sampling = draws(temperature=sampling.temperature, guidance=sampling.guidance)
        if kind is Masked and not isinstance(sampling, MaskedSampling):
            sampling = MaskedSampling(temperature=sampling.temperature, guidance=sampling.guidance)
        super().__init__(tokenizer, task, optimisation, text, text_drop, compile, checkpointing, sampling, formats)
        video = self.video_tokenizer[0]
        if continuous:
            head = partial(head, channels=LatentSpace(video).channels)
        loud = [each.name for each in self.tasks.values() if getattr(each, "audio", False)]
        if loud and audio is None:
            raise ValueError(
                f"{loud[0]} needs an audio tokenizer: give its folder by stage.audio=..., or leave tasks with sound out"
            )
        sound = None if audio is None else store.load(audio)
        self.audio_tokenizer = [sound]  # in a list as the video's
        codes = 0 if sound is None else sound.levels * sound.vocabulary
        vocabulary = Vocabulary(0 if continuous else video.vocabulary, codes, self.pieces)
        made = head(vocabulary=vocabulary, width=lm.width)
        if sound is not None:
            self.audio_hash = store.fingerprint(sound)
            made = AudioVisual(vocabulary, lm.width, made, sound.levels)
        self.weighting = Weighting(frame_weights or (), level_weights or (), onset, prompt_weight)
        if continuous and frame_weights:
            raise ValueError("stage.frame_weights is for heads of codes; leave it out with continuous tokens")
        if prompt_weight and not isinstance(made, Head | AudioVisual):
            raise ValueError(
                f"stage.prompt_weight is for heads that predict token by token; {type(made).__name__} does not"
            )
        self.weighting.check(0 if sound is None else sound.levels)
        self.lm = LanguageModel(lm, made)
        self.measure = getattr(self.lm.head, "measure", "nll")
        if self.lm.head.size != vocabulary.visual:
            raise ValueError(
                f"the head predicts {self.lm.head.size} codes, the tokenizer has {vocabulary.visual}; "
                "set head.bits so that together they number the tokenizer's codes"
            )
        apart = getattr(lm, "layout", None) or getattr(lm, "cross_attention", False)
        if pack and (apart or not hasattr(lm, "blocks") or isinstance(self.lm.head, Masked | MaskedTokenDiffusion)):
            raise ValueError(
                "stage.pack=true is for transformers that go on, without lm.layout or cross_attention; "
                f"leave it out with lm={type(lm).__name__} and head={type(self.lm.head).__name__}"
            )
        self.pack, self.reinforcement = pack, reinforcement
        if reinforcement is not None:
            reinforcement.check(self.lm.head)
        acts = None if actions is None else store.load(store.part_of(actions, "actions"))
        self.latent_actions = [acts]
        self.actions_hash = None if acts is None else store.fingerprint(acts)
        check_actions(acts, video, self.lm.head)
        if only is not None:
            for name, parameter in self.lm.named_parameters():
                parameter.requires_grad_(re.search(only, name) is not None)
            if not any(parameter.requires_grad for parameter in self.lm.parameters()):
                raise ValueError(f"stage.only={only} is in no parameter's name, so nothing would learn")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        dropped = self.dropped(len(batch.clip))
        weighting = self.weighting if self.training else None  # what validation logs is without weights
        loss, metrics = self.model.loss(batch.clip, batch.name, dropped, packed=self.pack, weighting=weighting)
        if self.training and self.reinforcement is not None:
            more, reward = self.reinforcement.loss(self.model, batch.clip, batch.name)
            loss = loss + self.reinforcement.weight * more
            self.log(f"reward/{batch.name}", reward, batch_size=len(batch.clip))
        return loss, metrics

    def more(self) -> dict[str, Any]:
        return {"audio": self.audio_tokenizer[0], "actions": self.latent_actions[0]}

    def _check_tokens(self, source: TokenShards) -> None:
        super()._check_tokens(source)
        if self.latent_actions[0] is not None:
            raise ValueError("actions are seen in pixels and data=tokens holds none; train on the clips themselves")

    def on_fit_start(self) -> None:
        if self.reinforcement is not None:
            lighten(self.lm, "float32")  # what it will set for drawing is there before anything is compiled
        super().on_fit_start()
        for part in (*self.audio_tokenizer, *self.latent_actions):
            if part is not None:
                part.to(self.device)

    @property
    def network(self) -> nn.Module:
        return self.lm.transformer

    def configure_optimizers(self) -> dict:
        return self.optimisation.configure(self, self.trainer.max_steps, inner=self.lm.transformer)
