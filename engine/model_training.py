"""What the training of all models that make clips has in common: a frozen tokenizer, tasks, and a text model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.data.module import Batch, ClipData, ClipSource
from reelm.data.tokens import TokenShards
from reelm.engine import outside, store
from reelm.engine.groups import groups, one_format_each
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_model import VideoModel
from reelm.tasks.formats import Format, Formats
from reelm.tasks.task import Mixture, Task, tasks_of
from reelm.tokenizers.text import SentencePieceText, T5Text


def train_text(source: ClipSource, vocabulary: int, captions: int = 4000) -> SentencePieceText:
    """A text model for the captions of a source (evenly spaced ones, clips' and images')."""
    count = min(captions, len(source))
    indices = [i * len(source) // count for i in range(count)]
    texts = [source.caption(i) for i in indices] + [source.caption(i, 1) for i in indices]
    return SentencePieceText.train([text for text in texts if text] or ["a video"], vocabulary)


class ModelTraining(L.LightningModule):
    """Everything but the model and its loss.

    Subclasses name the `made` kind of model and the `measure` of its loss, set the module that is named as the model's
    part, with room for `pieces` word pieces, and give `loss` and `network`.

    Args:
        tokenizer: folder of a trained video tokenizer; it stays frozen.
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

    made: ClassVar[type[VideoModel]]
    measure: str
    pieces: int

    def __init__(
        self,
        tokenizer: str | Path,
        task: Task | Mixture,
        optimisation: Optimisation,
        text: SentencePieceText | T5Text | int,
        text_drop: float,
        compile: bool,
        checkpointing: bool,
        sampling: Any,
        formats: Sequence[Format] | None = None,
    ) -> None:
        super().__init__()
        self.video_tokenizer = [outside.load(tokenizer)]  # in a list: not to be trained, averaged or checkpointed
        self.task, self.optimisation = task, optimisation
        self.tasks = {part.name: part for part in tasks_of(task)}
        if not is_dataclass(sampling):
            raise ValueError(
                "in training, sampler is how the model samples where nothing else is asked for: default, masked, "
                "token_denoising or masked_denoising; the others are for generate"
            )
        self.text = [text]  # in a list as well: T5 has weights
        self.text_drop, self.sampling = text_drop, sampling
        self.compile_blocks, self.checkpointing = compile, checkpointing
        self.formats = Formats(formats) if formats else None
        self.pieces = text if isinstance(text, int) else text.vocabulary
        self.model: VideoModel | None = None
        self.tokenizer_hash, self.audio_hash = store.fingerprint(self.video_tokenizer[0]), None
        self.actions_hash: str | None = None

    @property
    def metric(self) -> str:
        """What a sweep optimises."""
        return f"val/{self.measure}"

    @property
    def trained(self) -> nn.Module:
        return getattr(self, self.made.part)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to log, `measure` among it."""
        raise NotImplementedError

    def more(self) -> dict[str, Any]:
        """Further arguments of the model."""
        return {}

    @property
    def network(self) -> nn.Module:
        """The part with blocks, which are worth compiling and may be computed twice."""
        raise NotImplementedError

    def dropped(self, count: int) -> Tensor:
        """`(count,)` bool: whose prompts are left out this time."""
        return torch.rand(count, device=self.device) < (self.text_drop if self.training else 0.0)

    def start_from(self, folder: str | Path) -> None:
        """Begins with the weights and the text model of an exported model, which may be smaller than this one."""
        part = self.made.part
        if not (Path(folder) / part).is_dir():
            raise FileNotFoundError(f"no {part}/ in {folder}; init=... names the folder that holds {part}/")
        config = store.read_json(Path(folder) / "config.json")
        parts = {"tokenizer": self.tokenizer_hash, "audio": self.audio_hash, "actions": self.actions_hash}
        for name, own in parts.items():
            made_of = config.get(name)
            if made_of != own and (name == "tokenizer" or made_of is not None):  # sound may be learned later
                raise ValueError(
                    f"{folder} was trained on tokens of another tokenizer ({made_of}, this one is {own}); "
                    f"give the same stage.{name}=..."
                )
        store.grow(self.trained, folder, part)
        text = Path(folder) / "text.model"
        if isinstance(self.text[0], int) and text.is_file():
            self._read_with(SentencePieceText(text))

    def _read_with(self, text: SentencePieceText) -> None:
        """Takes the text model that the weights were trained with: another one numbers its word pieces differently."""
        if text.vocabulary > self.pieces:
            raise ValueError(
                f"the text model of the weights to go on from has {text.vocabulary} word pieces; "
                f"set stage.text to that or more, it is {self.pieces}"
            )
        self.text = [text]
        if self.model is not None:
            self.model.text = self.model.packer.text = text

    def setup(self, stage: str) -> None:
        data: ClipData = self.trainer.datamodule
        if self.model is None:
            text = self.text[0]
            text = train_text(data.train, text) if isinstance(text, int) else text
            usual = self._usual(data.train)
            model = self.made(
                self.video_tokenizer[0], text, self.trained, self.tasks, usual.shape, usual.fps, self.sampling,
                formats=self.formats, **self.more(),
            )  # fmt: skip
            object.__setattr__(self, "model", model)  # a view: its parts are trained and saved as `trained`
        data.text_length = self.model.packer.text_length
        data.groups = groups(self.task, self.formats, lambda part: prod(self.video_tokenizer[0].grid(*part.shape)))
        data.validation_groups = one_format_each(data.groups)

        for source in (data.train, data.validation):
            if isinstance(source, TokenShards):
                self._check_tokens(source)

    def _usual(self, source: ClipSource) -> Format:
        if self.formats is not None:
            return self.formats.parts[0]
        first = source.get(0)
        return Format(first.frames, first.size, first.fps)

    def _check_tokens(self, source: TokenShards) -> None:
        """ValueError where stored tokens are not the run's tokenizer's, or not all that its tasks need."""
        if source.tokenizer != self.tokenizer_hash:
            raise ValueError(
                f"{source.folder} holds tokens of another tokenizer ({source.tokenizer}, this one is "
                f"{self.tokenizer_hash}); give the stage.tokenizer=... they were made with, or encode the clips anew"
            )
        if self.formats is not None:
            raise ValueError("data=tokens holds clips of one format; leave stage.formats out, or train on pixels")
        for task in self.tasks.values():
            clip = source.get(0, frames=task.frames)
            if getattr(task, "audio", False):
                raise ValueError(f"{task.name} needs sound and data=tokens holds none: leave tasks with sound out")
            if task.controls or self.model.packer.needs_pixels(task.split(clip, torch.Generator())[0]):
                raise ValueError(
                    f"{task.name} needs pixels and data=tokens holds none: leave it out of the mixture with "
                    f"task.weights.{task.name}=0, or choose a task such as t2v, i2v or continuation"
                )

    def on_fit_start(self) -> None:
        self.video_tokenizer[0].to(self.device)
        if isinstance(self.text[0], T5Text):
            self.text[0].to(self.device)
        if (self.compile_blocks or self.checkpointing) and not hasattr(self.network, "blocks"):
            kind = type(self.network).__name__
            raise ValueError(f"stage.compile and stage.checkpointing are for networks of blocks; {kind} has none")
        if self.checkpointing:
            self.network.checkpointing = True
        if self.compile_blocks:
            for block in self.network.blocks:
                block.compile(dynamic=True)  # lengths and prefixes differ from batch to batch

    def training_step(self, batch: Batch, _: int) -> Tensor:
        self.batch_keys = batch.clip.keys
        loss, metrics = self.loss(batch)
        size = len(batch.clip)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log(f"train/{batch.name}", metrics[self.measure], batch_size=size)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        _, metrics = self.loss(batch)
        size = len(batch.clip)
        self.log(self.metric, metrics[self.measure], prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"val/{batch.name}", metrics[self.measure], batch_size=size, sync_dist=True)

    def samples(self) -> tuple[Tensor, list[str], float] | None:
        """Clips from up to four validation prompts, the prompts, and the frame rate."""
        source = self.trainer.datamodule.validation
        task = next((t for t in self.tasks.values() if t.frames != 1 and not t.controls), None)
        if task is None:
            task = next(iter(self.tasks.values()))
        group = next(group for group in self.trainer.datamodule.groups if group.name == task.name)
        clip = Clip.stack([source.get(i, **group.options()) for i in range(min(4, len(source)))])
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
