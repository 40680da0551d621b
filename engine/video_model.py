"""What all models that make clips have in common: a tokenizer, a text model, tasks, and one folder on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.data.writing import whole_file
from reelm.engine import store
from reelm.tasks.formats import Format, Formats
from reelm.tasks.preparing import Preparing
from reelm.tasks.task import Given, Task
from reelm.tokenizers.text import SentencePieceText, T5Text


class VideoModel(nn.Module):
    """A model that makes clips.

    Subclasses name themselves in messages (`noun`), their trained `part`, which is a module and a sub-folder of this
    name, and the `kind` of sampling where a folder does not name it. They set `packer`, which puts what is given into
    the form that the part takes.

    Args:
        tokenizer: of video; it stays frozen.
        text: the text model.
        tasks: what the model was trained to do, by name.
        shape: frames, height and width of its clips. fps: their rate.
        sampling: how it samples where nothing else is asked for.
        formats: the sizes, rates and lengths that it was trained on, where these are several; `shape` and `fps` are
            then the first one's.
        audio: tokenizer of sound, of a model that hears or makes sound; it stays frozen.
    """

    noun: ClassVar[str]
    part: ClassVar[str]
    kind: ClassVar[type]
    frozen: ClassVar[tuple[str, ...]] = ("audio",)  # other parts that a model may have, in folders of these names
    packer: Preparing

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        tasks: Mapping[str, Task],
        shape: tuple[int, int, int],
        fps: float,
        sampling: Any,
        formats: Formats | None = None,
        audio: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.audio = None if audio is None else audio.eval().requires_grad_(False)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.text, self.tasks = text, dict(tasks)
        usual = Format(shape[0], shape[1:], fps) if formats is None else formats.parts[0]
        self.shape, self.fps, self.sampling, self.formats = usual.shape, usual.fps, sampling, formats

    @property
    def trained(self) -> nn.Module:
        """The trained part."""
        return getattr(self, self.part)

    @property
    def device(self) -> torch.device:
        return next(self.trained.parameters()).device

    def loss(self, clip: Clip, task: str, unprompted: Tensor | bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of clips in training, and what to log.

        unprompted: `(B,)` bool: whose prompts are left out, for classifier-free guidance; True: all.
        """
        raise NotImplementedError

    def generate(
        self,
        given: Given | str | list[str],
        task: str = "t2v",
        sampling: Any = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Clip:
        """Clips for what is given: a prompt, several, or a `Given` with known pixels or a condition.

        sampling: None: the model's own. seed: sample i draws with seed + i. progress: called with what is done and all
        that there is to do.
        """
        raise NotImplementedError

    def lighten(self, dtype: str, compiled: bool = False) -> str:
        """Lets the trained part multiply in `dtype`: float32, bfloat16, int8, or auto for the fastest here, which is
        returned. What it makes may differ by rounding; a model that is to be trained must not be lightened.

        compiled: passes of decoding are compiled too, as CUDA graphs on GPUs.
        """
        if compiled:
            raise ValueError(f"a {self.noun} has no passes to compile; leave compile=true out")
        if dtype not in ("auto", "float32"):
            raise ValueError(f"a {self.noun} multiplies in float32 alone; leave dtype={dtype} out")
        return "float32"

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            raise ValueError(f"this model has no task {name!r}; it was trained for {', '.join(self.tasks)}")
        return self.tasks[name]

    def prompted(self, task: str) -> bool:
        """Whether the model was taught to heed the prompts of a task."""
        return getattr(self.task(task), "prompted", True)

    def sampling_with(self, changes: Mapping[str, Any]) -> Any:
        """The model's own way to sample with some settings changed; ValueError for those that it does not have."""
        names = [field.name for field in fields(self.sampling)]
        for name, value in changes.items():
            if name not in names:
                raise ValueError(f"this model has no sampler.{name}; it has {', '.join(names)}")
            own = getattr(self.sampling, name)
            number, given = (isinstance(x, (int, float)) and not isinstance(x, bool) for x in (own, value))
            if own is None and (isinstance(value, str) if name == "decoding" else not given):
                hint = f"ways to decode are chosen by sampler={value}" if name == "decoding" else "give a number"
                raise ValueError(f"sampler.{name} cannot be {value!r}; {hint}")
            if own is not None and (number != given or (isinstance(own, int) and not isinstance(value, int))):
                kind = "a whole number" if isinstance(own, int) else "a number" if number else "a word"
                raise ValueError(f"sampler.{name} is {kind} such as {own}; got {value!r}")
        return replace(self.sampling, **changes)

    def _sampling(self, sampling: Any, *kinds: type) -> Any:
        """The way to sample that is asked for, or the model's own; ValueError where it is not of these kinds."""
        sampling = sampling or self.sampling
        if not isinstance(sampling, kinds):
            raise ValueError(f"this {self.noun} cannot sample by {type(sampling).__name__}; leave sampler=... out")
        return sampling

    def fitting(
        self, frames: int | None = None, size: tuple[int, int] | None = None, fps: float | None = None
    ) -> Format:
        """The format of what it makes at once for a clip that is asked for (`Formats.fitting`)."""
        if self.formats is not None:
            return self.formats.fitting(frames, size, fps)
        own = Formats((Format(self.shape[0], self.shape[1:], self.fps),)).fitting(None, size, fps)
        return own if frames is None else replace(own, frames=min(frames, own.frames))

    def _given(self, given: Given | str | list[str], task: str) -> Given:
        if isinstance(given, Given):
            return given.to(self.device)
        wanted, captions = self.task(task), (given,) if isinstance(given, str) else tuple(given)
        if not getattr(wanted, "from_prompt", False):
            raise ValueError(f"task={task} needs more than a prompt: give what it is made from, as a Given")
        captions = captions if self.prompted(task) else ("",) * len(captions)
        shape = (wanted.frames or self.shape[0], *self.shape[1:])
        return Given(shape, captions, fps=self.fps, asks=getattr(wanted, "asks", ("video",)))

    def save_pretrained(self, folder: str | Path, dtype: str = "float32", notes: dict[str, Any] | None = None) -> None:
        """Writes `tokenizer/`, other parts such as `audio/`, the trained part, `text.model` and, last, `config.json`.
        Tokenizers keep their own precision, so that their tokens stay those that the part was trained on. Of a T5
        encoder only the place is written."""
        folder = Path(folder)
        store.save(self.tokenizer, folder / "tokenizer")
        others = {name: part for name in self.frozen if (part := getattr(self, name)) is not None}
        for name, part in others.items():
            store.save(part, folder / name)
        store.save(self.trained, folder / self.part, dtype)
        if isinstance(self.text, SentencePieceText):
            with whole_file(folder / "text.model") as part:
                part.write_bytes(self.text.model)
        config = {
            "tokenizer": store.fingerprint(self.tokenizer),
            "tasks": store.describe(self.tasks),
            "shape": list(self.shape),
            "fps": self.fps,
            "sampling": store.describe(self.sampling),
            "notes": notes or {},
        }
        config |= {name: store.fingerprint(part) for name, part in others.items()}
        if self.formats is not None:
            config["formats"] = store.describe(self.formats)
        if isinstance(self.text, T5Text):
            config["t5"] = {"path": os.path.abspath(self.text.path), "dtype": self.text.dtype}
        with whole_file(folder / "config.json") as part:
            part.write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VideoModel:
        """The model of a folder written by `save_pretrained`; nothing in it can run code."""
        folder = Path(folder)
        config = store.read_json(folder / "config.json")
        tokenizer = cls._tokenizer(folder, "tokenizer", config)
        more = {name: cls._tokenizer(folder, name, config) for name in cls.frozen if name in config}
        try:
            tasks, shape, fps = store.build(config["tasks"]), tuple(config["shape"]), float(config["fps"])
            sampling = config["sampling"]
            sampling = store.build(sampling) if "_target_" in sampling else cls.kind(**sampling)
            more |= {"formats": store.build(config["formats"])} if "formats" in config else {}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder}/config.json does not describe a {cls.noun}: {error}") from None
        text = T5Text(**config["t5"]) if "t5" in config else SentencePieceText(folder / "text.model")
        return cls(tokenizer, text, store.load(folder / cls.part), tasks, shape, fps, sampling, **more).eval()

    @classmethod
    def _tokenizer(cls, folder: Path, name: str, config: Mapping[str, Any]) -> nn.Module:
        """A tokenizer of the folder; ValueError where it is not the one that the model was trained with."""
        tokenizer = store.load(folder / name)
        if store.fingerprint(tokenizer) != config.get(name):
            raise ValueError(
                f"{folder}/{cls.part} was trained on tokens of another tokenizer than {folder}/{name} "
                f"({config.get(name)}, not {store.fingerprint(tokenizer)}); put the right one there"
            )
        return tokenizer
