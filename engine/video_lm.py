"""`VideoLM`: tokenizer, text model and language model joined; one folder on disk; generation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.data.writing import whole_file
from reelm.engine import outside, store
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.sampling import Sampling, generate, seeded
from reelm.tasks.packing import Packer
from reelm.tasks.task import Given, Task
from reelm.tokenizers.text import SentencePieceText, T5Text
from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.tokens import Tokens

BOX = Path(__file__).resolve().parents[1] / "pretrained"


class VideoLM(nn.Module):
    """A video language model.

    Args:
        tokenizer: of video; it stays frozen.
        text: the text model.
        lm: transformer and head.
        tasks: what the model was trained to do, by name.
        shape: frames, height and width of its clips. fps: their rate.
        sampling: how it samples where nothing else is asked for.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        lm: LanguageModel,
        tasks: Mapping[str, Task],
        shape: tuple[int, int, int] = (17, 64, 64),
        fps: float = 8.0,
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.lm, self.text, self.tasks = lm, text, dict(tasks)
        self.shape, self.fps, self.sampling = tuple(shape), fps, sampling
        self.packer = Packer(tokenizer, text, lm.head.vocabulary, masked=isinstance(lm.head, Masked))

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def save_pretrained(self, folder: str | Path, dtype: str = "float32", notes: dict[str, Any] | None = None) -> None:
        """Writes `tokenizer/`, `lm/`, `text.model` and, last, `config.json`. The tokenizer keeps its own precision, so
        that its tokens stay those that the language model was trained on. Of a T5 encoder only the place is written."""
        folder = Path(folder)
        store.save(self.tokenizer, folder / "tokenizer")
        store.save(self.lm, folder / "lm", dtype)
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
        if isinstance(self.text, T5Text):
            config["t5"] = {"path": os.path.abspath(self.text.path), "dtype": self.text.dtype}
        with whole_file(folder / "config.json") as part:
            part.write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VideoLM:
        """The model of a folder written by `save_pretrained`; nothing in it can run code."""
        folder = Path(folder)
        config = store.read_json(folder / "config.json")
        tokenizer = store.load(folder / "tokenizer")
        if store.fingerprint(tokenizer) != config.get("tokenizer"):
            raise ValueError(
                f"{folder}/lm was trained on tokens of another tokenizer than {folder}/tokenizer "
                f"({config.get('tokenizer')}, not {store.fingerprint(tokenizer)}); put the right one there"
            )
        try:
            tasks, shape, fps = store.build(config["tasks"]), tuple(config["shape"]), float(config["fps"])
            sampling = config["sampling"]
            sampling = store.build(sampling) if "_target_" in sampling else Sampling(**sampling)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder}/config.json does not describe a video language model: {error}") from None
        text = T5Text(**config["t5"]) if "t5" in config else SentencePieceText(folder / "text.model")
        return cls(tokenizer, text, store.load(folder / "lm"), tasks, shape, fps, sampling).eval()

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            raise ValueError(f"this model has no task {name!r}; it was trained for {', '.join(self.tasks)}")
        return self.tasks[name]

    def _given(self, given: Given | str | list[str], task: str) -> Given:
        if isinstance(given, Given):
            return given.to(self.device)
        captions = (given,) if isinstance(given, str) else tuple(given)
        shape = (self.task(task).frames or self.shape[0], *self.shape[1:])
        return Given(shape, captions, fps=self.fps)

    @torch.inference_mode()
    def generate(
        self,
        given: Given | str | list[str],
        task: str = "t2v",
        sampling: Sampling | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Clip:
        """Clips for what is given: a prompt, several, or a `Given` with known pixels or a condition.

        seed: sample i draws with seed + i, so it does not depend on its neighbours as long as no prompt of the batch
            takes more text slots (a multiple of 8 word pieces) than its own. progress: called with tokens
            made and tokens asked.
        """
        given = self._given(given, task)
        sequence = self.packer.pack(given, self.task(task).marker)
        known = self.packer.known_in(sequence)
        where = Tokens.positions(self.packer.grid(given), self.device)[known.shape[1] :]
        masked, sampling = self.packer.masked, sampling or self.sampling
        if isinstance(sampling, MaskedSampling) and not masked:
            head = type(self.lm.head).__name__
            raise ValueError(f"sampler=masked needs a model with a masked head; this one's is {head}: leave it out")
        made = (fill if masked else partial(generate, positions=where))(
            self.lm.transformer,
            self.lm.head,
            sequence,
            sampling=sampling,
            unconditional=self.packer.without_prompt(sequence),
            generator=seeded(list(range(seed, seed + len(given))), self.device),
            callback=None if progress is None else lambda count, _: progress(count, len(where)),
        )
        codes = self.lm.head.vocabulary.from_visual(torch.cat([known, made], 1))
        video = self.tokenizer.decode(codes.unflatten(1, self.packer.grid(given)))
        return Clip(video, given.fps, given.captions)


def find(name: str | Path) -> Path:
    """The folder of a model of the box ("zoetrope"), or the folder that the name is."""
    folder = Path(name)
    if not folder.is_dir() and (BOX / str(name)).is_dir():
        folder = BOX / str(name)
    if not folder.is_dir():
        boxed = sorted(path.name for path in BOX.iterdir() if path.is_dir()) if BOX.is_dir() else []
        raise FileNotFoundError(f"no model {name}: give a folder or one of the box: {', '.join(boxed) or '(empty)'}")
    return folder


def load(name: str | Path) -> VideoLM:
    """A model from the box by its name ("zoetrope"), or from a folder."""
    return VideoLM.from_pretrained(find(name))


def load_tokenizer(name: str, trust: bool = False) -> tuple[VideoTokenizer, Path]:
    """The tokenizer of a model of the box, of a model's folder, or of its own folder, which may be one from outside
    (`outside.load`); and that folder. trust: TorchScript programs."""
    folder = store.part_of(find(name), "tokenizer")
    model = outside.load(folder, trust)
    if not isinstance(model, VideoTokenizer):
        raise ValueError(f"model={name} holds a {type(model).__name__}, which is no video tokenizer")
    return model, folder
