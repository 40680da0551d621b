"""`VideoLM`: tokenizer, text model and language model joined. Where models of any kind are found and loaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.engine import outside, store
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.engine.video_model import VideoModel
from reelm.lm.decoding import decode
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.speculative import Jacobi
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion, draw_latents
from reelm.tasks.packing import Packer
from reelm.tasks.task import Given, Task
from reelm.tokenizers.text import SentencePieceText, T5Text
from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.tokens import Tokens

BOX = Path(__file__).resolve().parents[1] / "pretrained"


class VideoLM(VideoModel):
    """A video language model.

    Args:
        tokenizer: of video; it stays frozen.
        text: the text model.
        lm: transformer and head.
        tasks: what the model was trained to do, by name.
        shape: frames, height and width of its clips. fps: their rate.
        sampling: how it samples where nothing else is asked for.
    """

    noun, part, kind = "video language model", "lm", Sampling

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        lm: LanguageModel,
        tasks: Mapping[str, Task],
        shape: tuple[int, int, int] = (17, 64, 64),
        fps: float = 8.0,
        sampling: Sampling | TokenDenoising = Sampling(),
    ) -> None:
        super().__init__(tokenizer, text, tasks, shape, fps, sampling)
        self.lm = lm
        masked, continuous = (isinstance(lm.head, kind) for kind in (Masked, TokenDiffusion))
        self.packer = Packer(tokenizer, text, lm.head.vocabulary, masked, continuous)

    def lighten(self, dtype: str) -> str:
        return lighten(self.lm, dtype)

    def _decode(
        self,
        given: Given,
        task: str,
        sampling: Sampling,
        seed: int,
        progress: Callable[[int, int], None] | None,
        made: list[Tensor] | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The clip's codes `(B, t, h, w)` so far, and which of them `(t * h * w,)` are there, after each pass."""
        sequence = self.packer.pack(given, self.task(task).marker)
        known, grid = self.packer.known_in(sequence), self.packer.grid(given)
        where, skip = Tokens.positions(grid, self.device), known.shape[1]
        codes = known.new_zeros(len(given), len(where))
        codes[:, :skip] = self.lm.head.vocabulary.from_visual(known)
        there = torch.arange(len(where)) < skip
        yield codes.unflatten(1, grid), there
        made = [] if made is None else made
        before, count = (torch.cat(made, 1).to(self.device) if made else None), 0
        steps = decode(
            self.lm.transformer,
            self.lm.head,
            sequence,
            where[skip:],
            sampling,
            self.packer.without_prompt(sequence),
            seeded(list(range(seed, seed + len(given))), self.device),
            before,
        )
        for numbers, ids in steps:
            count += len(numbers)
            if before is None or count > before.shape[1]:
                made.append(ids)
            codes[:, numbers + skip] = self.lm.head.vocabulary.from_visual(ids)
            there[numbers.cpu() + skip] = True
            if progress is not None:
                progress(count, len(where) - skip)
            yield codes.unflatten(1, grid), there

    def _how(self, sampling: Sampling | TokenDenoising | None) -> Sampling | TokenDenoising:
        """The way to sample; where it leaves it open in which passes, speculatively, which changes nothing."""
        sampling = self._sampling(sampling, Sampling if self.packer.space is None else TokenDenoising)
        if isinstance(sampling, MaskedSampling) and not self.packer.masked:
            head = type(self.lm.head).__name__
            raise ValueError(f"sampler=masked needs a model with a masked head; this one's is {head}: leave it out")
        if isinstance(sampling, Sampling) and sampling.decoding is None and not self.packer.masked:
            return replace(sampling, decoding=Jacobi())
        return sampling

    def _at_once(
        self,
        given: Given,
        task: str,
        sampling: Sampling | TokenDenoising,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> Clip:
        """Clips of models whose tokens are filled in from all sides, or are continuous."""
        sequence = self.packer.pack(given, self.task(task).marker)
        known = self.packer.known_in(sequence)
        where = Tokens.positions(self.packer.grid(given), self.device)[known.shape[1] :]
        made = (fill if self.packer.masked else partial(draw_latents, positions=where))(
            self.lm.transformer,
            self.lm.head,
            sequence,
            sampling=sampling,
            unconditional=self.packer.without_prompt(sequence),
            generator=seeded(list(range(seed, seed + len(given))), self.device),
            callback=None if progress is None else lambda count, _: progress(count, len(where)),
        )
        tokens = torch.cat([known, made], 1).unflatten(1, self.packer.grid(given))
        if self.packer.space is None:
            video = self.tokenizer.decode(self.lm.head.vocabulary.from_visual(tokens))
        else:
            video = self.packer.space.decode(tokens.movedim(-1, 1))
        return Clip(video, given.fps, given.captions)

    @torch.inference_mode()
    def generate(
        self,
        given: Given | str | list[str],
        task: str = "t2v",
        sampling: Sampling | TokenDenoising | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        made: list[Tensor] | None = None,
    ) -> Clip:
        """Clips for what is given: a prompt, several, or a `Given` with known pixels or a condition.

        seed: sample i draws with seed + i, so it does not depend on its neighbours as long as no prompt of the batch
            takes more text slots (a multiple of 8 word pieces) than its own. progress: called with tokens
            made and tokens asked after each pass. made: a list that is filled with the ids `(B, k)` of each pass; one
            that was filled by a call that was interrupted is gone on from.
        """
        given, sampling = self._given(given, task), self._how(sampling)
        if self.packer.masked or self.packer.space is not None:
            return self._at_once(given, task, sampling, seed, progress)
        codes, _ = deque(self._decode(given, task, sampling, seed, progress, made), maxlen=1).pop()
        return Clip(self.tokenizer.decode(codes), given.fps, given.captions)

    @torch.inference_mode()
    def stream(
        self,
        given: Given | str | list[str],
        task: str = "t2v",
        sampling: Sampling | TokenDenoising | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        made: list[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The frames of `generate`, `(B, 3, T, H, W)` at a time, as soon as their tokens exist.

        Together they are what `generate` gives, in float32 to the last bit.
        """
        given, sampling = self._given(given, task), self._how(sampling)
        if self.packer.masked or self.packer.space is not None:
            yield self._at_once(given, task, sampling, seed, progress).video
            return
        past, sent = {}, 0
        for codes, there in self._decode(given, task, sampling, seed, progress, made):
            ready = int(there.unflatten(0, codes.shape[1:]).flatten(1).all(1).long().cumprod(0).sum())
            if ready > sent:
                yield self.tokenizer.decode(codes[:, sent:ready], past)
                sent = ready


def find(name: str | Path) -> Path:
    """The folder of a model of the box ("zoetrope"), or the folder that the name is."""
    folder = Path(name)
    if not folder.is_dir() and (BOX / str(name)).is_dir():
        folder = BOX / str(name)
    if not folder.is_dir():
        boxed = sorted(path.name for path in BOX.iterdir() if path.is_dir()) if BOX.is_dir() else []
        raise FileNotFoundError(f"no model {name}: give a folder or one of the box: {', '.join(boxed) or '(empty)'}")
    return folder


def load(name: str | Path) -> VideoModel:
    """A model from the box by its name ("zoetrope"), or from a folder, which tells its kind by the part in it."""
    folder = find(name)
    kind = VideoDiffusion if (folder / VideoDiffusion.part).is_dir() else VideoLM
    return kind.from_pretrained(folder)


def load_tokenizer(name: str, trust: bool = False) -> tuple[VideoTokenizer, Path]:
    """The tokenizer of a model of the box, of a model's folder, or of its own folder, which may be one from outside
    (`outside.load`); and that folder. trust: TorchScript programs."""
    folder = store.part_of(find(name), "tokenizer")
    model = outside.load(folder, trust)
    if not isinstance(model, VideoTokenizer):
        raise ValueError(f"model={name} holds a {type(model).__name__}, which is no video tokenizer")
    return model, folder
