"""Training of the video language model on a mixture of tasks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.data.module import Batch, ClipData, ClipSource, Group
from reelm.data.tokens import TokenShards
from reelm.engine import outside, store
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_lm import VideoLM
from reelm.lm.heads import Head
from reelm.lm.language_model import LanguageModel
from reelm.lm.sampling import Sampling
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.task import Mixture, Task, tasks_of
from reelm.tokenizers.text import SentencePieceText, T5Text


def train_text(source: ClipSource, vocabulary: int, captions: int = 4000) -> SentencePieceText:
    """A text model for the captions of a source (evenly spaced ones, clips' and images')."""
    count = min(captions, len(source))
    indices = [i * len(source) // count for i in range(count)]
    texts = [source.caption(i) for i in indices] + [source.caption(i, 1) for i in indices]
    return SentencePieceText.train([text for text in texts if text] or ["a video"], vocabulary)


class LMTraining(L.LightningModule):
    """Next-token prediction over everything that the tasks ask for.

    Args:
        tokenizer: folder of a trained video tokenizer; it stays frozen.
        lm: the transformer.
        head: how tokens are predicted, as a function of the vocabulary and the width (`functools.partial` of a head).
        task: a task or a mixture of them.
        optimisation: learning rate and schedule.
        text: a trained text model, or the number of word pieces of one to be trained on the captions.
        text_drop: share of prompts left out, for classifier-free guidance.
        compile: let torch compile the blocks (half a minute at the start, and a C++ compiler on CPUs; faster steps).
        only: a regular expression for the names of the parameters that learn, such as "temporal|gate" of a dual-channel
            layout whose first channel comes from an image model (`init`); None: all.
        sampling: with which samples are drawn to be looked at, and which the saved model has by default.
    """

    metric = "val/nll"  # what a sweep optimises

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
        only: str | None = None,
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__()
        self.video_tokenizer = [outside.load(tokenizer)]  # in a list: not to be trained, averaged or checkpointed
        self.task, self.optimisation = task, optimisation
        self.tasks = {part.name: part for part in tasks_of(task)}
        self.text = [text]  # in a list as well: T5 has weights
        self.text_drop, self.compile_blocks, self.sampling = text_drop, compile, sampling
        pieces = text if isinstance(text, int) else text.vocabulary
        vocabulary = Vocabulary(visual=self.video_tokenizer[0].vocabulary, text=pieces)
        self.lm = LanguageModel(lm, head(vocabulary=vocabulary, width=lm.width))
        if self.lm.head.size != vocabulary.visual:
            raise ValueError(
                f"the head predicts {self.lm.head.size} codes, the tokenizer has {vocabulary.visual}; "
                "set head.bits so that together they number the tokenizer's codes"
            )
        if only is not None:
            for name, parameter in self.lm.named_parameters():
                parameter.requires_grad_(re.search(only, name) is not None)
            if not any(parameter.requires_grad for parameter in self.lm.parameters()):
                raise ValueError(f"stage.only={only} is in no parameter's name, so nothing would learn")
        self.model: VideoLM | None = None
        self.tokenizer_hash = store.fingerprint(self.video_tokenizer[0])

    def start_from(self, folder: str | Path) -> None:
        """Begins with the weights and the text model of an exported model, which may be smaller than this one."""
        if not (Path(folder) / "lm").is_dir():
            raise FileNotFoundError(f"no lm/ in {folder}; init=... names the folder that holds lm/")
        made_of = store.read_json(Path(folder) / "config.json").get("tokenizer")
        if made_of != self.tokenizer_hash:
            raise ValueError(
                f"{folder} was trained on tokens of another tokenizer ({made_of}, this one is {self.tokenizer_hash}); "
                "give the same stage.tokenizer=..."
            )
        store.grow(self.lm, folder, "lm")
        text = Path(folder) / "text.model"
        if isinstance(self.text[0], int) and text.is_file():
            self._read_with(SentencePieceText(text))

    def _read_with(self, text: SentencePieceText) -> None:
        """Takes the text model that the weights were trained with: another one numbers its word pieces differently."""
        if text.vocabulary > self.lm.head.vocabulary.text:
            raise ValueError(
                f"the text model of the weights to go on from has {text.vocabulary} word pieces; "
                f"set stage.text to that or more, it is {self.lm.head.vocabulary.text}"
            )
        self.text = [text]
        if self.model is not None:
            self.model.text = self.model.packer.text = text

    def setup(self, stage: str) -> None:
        data: ClipData = self.trainer.datamodule
        if self.model is None:
            text = self.text[0]
            text = train_text(data.train, text) if isinstance(text, int) else text
            first = data.train.get(0)
            shape = (first.frames, *first.size)
            model = VideoLM(self.video_tokenizer[0], text, self.lm, self.tasks, shape, first.fps, self.sampling)
            object.__setattr__(self, "model", model)  # a view: its parts are trained and saved as `lm`
        data.text_length = self.model.packer.text_length
        data.groups = [
            Group(
                task.name,
                frames=task.frames,
                controls=task.controls,
                batch=self.task.image_batch if task.frames == 1 and isinstance(self.task, Mixture) else 1.0,
                schedule=self.task.schedule(task) if isinstance(self.task, Mixture) else None,
            )
            for task in self.tasks.values()
        ]

        for source in (data.train, data.validation):
            if isinstance(source, TokenShards):
                self._check_tokens(source)

    def _check_tokens(self, source: TokenShards) -> None:
        """ValueError where stored tokens are not the run's tokenizer's, or not all that its tasks need."""
        if source.tokenizer != self.tokenizer_hash:
            raise ValueError(
                f"{source.folder} holds tokens of another tokenizer ({source.tokenizer}, this one is "
                f"{self.tokenizer_hash}); give the stage.tokenizer=... they were made with, or encode the clips anew"
            )
        for task in self.tasks.values():
            clip = source.get(0, frames=task.frames)
            if task.controls or self.model.packer.needs_pixels(task.split(clip, torch.Generator())[0]):
                raise ValueError(
                    f"{task.name} needs pixels and data=tokens holds none: leave it out of the mixture with "
                    f"task.weights.{task.name}=0, or choose a task such as t2v, i2v or continuation"
                )

    def on_fit_start(self) -> None:
        self.video_tokenizer[0].to(self.device)
        if isinstance(self.text[0], T5Text):
            self.text[0].to(self.device)
        if self.compile_blocks:
            for block in self.lm.transformer.blocks:
                block.compile(dynamic=True)  # lengths and prefixes differ from batch to batch

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        task, packer = self.tasks[batch.name], self.model.packer
        given, target = task.split(batch.clip)
        with torch.no_grad():
            tokens = packer.tokenizer.encode(target.video) if target.tokens is None else target.tokens
            drop = torch.rand(len(given), device=self.device) < (self.text_drop if self.training else 0.0)
            sequence = packer.pack(given, task.marker, tokens, unprompted=drop)
        return self.lm.loss(sequence)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        self.batch_keys = batch.clip.keys
        loss, metrics = self.loss(batch)
        size = len(batch.clip)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log(f"train/{batch.name}", metrics["nll"], batch_size=size)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        _, metrics = self.loss(batch)
        size = len(batch.clip)
        self.log("val/nll", metrics["nll"], prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"val/{batch.name}", metrics["nll"], batch_size=size, sync_dist=True)

    def samples(self) -> tuple[Tensor, list[str], float] | None:
        """Clips from up to four validation prompts, the prompts, and the frame rate."""
        source = self.trainer.datamodule.validation
        task = next((t for t in self.tasks.values() if t.frames != 1 and not t.controls), None)
        if task is None:
            task = next(iter(self.tasks.values()))
        count = min(4, len(source))
        clip = Clip.stack([source.get(i, frames=task.frames, controls=task.controls) for i in range(count)])
        if clip.tokens is not None:  # known frames are then shown as the tokenizer shows them
            clip = clip.replace(video=self.model.tokenizer.decode(clip.tokens.to(self.device)), tokens=None)
        given = task.split(clip)[0]
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be made anew for each layer's cache
            sample = self.model.generate(given, task.name, self.sampling, seed=0)
        return sample.video, list(sample.captions), sample.fps

    def export(self, folder: Path, step: int) -> None:
        self.model.save_pretrained(folder, dtype="bfloat16", notes={"step": step})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer_hash"] = self.tokenizer_hash
        if isinstance(self.model.text, SentencePieceText):
            checkpoint["text_model"] = torch.frombuffer(bytearray(self.model.text.model), dtype=torch.uint8)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("tokenizer_hash") != self.tokenizer_hash:
            raise ValueError(
                f"the checkpoint was trained on tokens of another tokenizer ({checkpoint.get('tokenizer_hash')}, "
                f"this one is {self.tokenizer_hash}); give the same stage.tokenizer=..., "
                "or start anew with resume=false"
            )
        if isinstance(self.text[0], int):
            if "text_model" not in checkpoint:
                raise ValueError("the checkpoint holds no text model; begin a new run from its model by init=...")
            self._read_with(SentencePieceText(checkpoint["text_model"].numpy().tobytes()))

    def configure_optimizers(self) -> dict:
        return self.optimisation.configure(self, self.trainer.max_steps, inner=self.lm.transformer)
