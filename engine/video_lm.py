"""`VideoLM`: tokenizer, text model and language model joined. Where models of any kind are found and loaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.engine import outside, store
from reelm.engine.interruption import Account
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.engine.video_model import VideoModel
from reelm.lm.decoding import OneByOne, decode
from reelm.lm.heads import Head
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.masked_diffusion import MaskedDenoising, MaskedTokenDiffusion, fill_latents
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.speculative import Jacobi
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion, draw_latents
from reelm.tasks.formats import Formats
from reelm.tasks.packing import Packer
from reelm.tasks.task import Given, Task
from reelm.tokenizers.latent_actions import LatentActions
from reelm.tokenizers.text import SentencePieceText, T5Text
from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.tokens import Tokens

LEVEL_SEEDS = 1 << 32  # between the seeds of the levels of sound, so that no two parts of a clip draw the same
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
        formats, audio: as for all `VideoModel`s; it is told the format by tokens.
        actions: the latent action model by whose codes the clips are played (Genie); it stays frozen.
    """

    noun, part, kind = "video language model", "lm", Sampling
    frozen = ("audio", "actions")

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        lm: LanguageModel,
        tasks: Mapping[str, Task],
        shape: tuple[int, int, int] = (17, 64, 64),
        fps: float = 8.0,
        sampling: Sampling | TokenDenoising = Sampling(),
        formats: Formats | None = None,
        audio: nn.Module | None = None,
        actions: LatentActions | None = None,
    ) -> None:
        super().__init__(tokenizer, text, tasks, shape, fps, sampling, formats, audio)
        self.lm = lm
        self.actions = None if actions is None else actions.eval().requires_grad_(False)
        check_actions(actions, tokenizer, lm.head)
        masked = isinstance(lm.head, Masked | MaskedTokenDiffusion)
        continuous = isinstance(lm.head, TokenDiffusion)
        self.packer = Packer(tokenizer, text, lm.head.vocabulary, masked, continuous, formats, audio)

    def lighten(self, dtype: str) -> str:
        return lighten(self.lm, dtype)

    def loss(self, clip: Clip, task: str, unprompted: Tensor | bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        given, target = self.task(task).split(clip)
        with torch.no_grad():
            tokens, sound = target.tokens, None
            if tokens is None and "video" in given.asks:
                tokens = self.tokenizer.encode(target.video)
            if self.actions is not None and target.frames > 1:
                given = given.replace(actions=self.actions.encode(target.video))
            if "audio" in given.asks:
                sound = self.packer.sound.encode(target.audio, target.audio_rate)
            sequence = self.packer.pack(given, self.task(task).marker, tokens, unprompted=unprompted, sound=sound)
        return self.lm.loss(sequence)

    def _decode(
        self, given: Given, sequence: Sequence, sampling: Sampling, seed: int, tokens: Account
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The clip's codes `(B, t, h, w)` so far, and which of them `(t * h * w,)` are there, after each pass."""
        known, grid = self.packer.known_in(sequence), self.packer.grid(given)
        where, skip = Tokens.positions(grid, self.device), known.shape[1]
        codes = known.new_zeros(len(given), len(where))
        codes[:, :skip] = self.lm.head.vocabulary.from_visual(known)
        there = torch.arange(len(where)) < skip
        yield codes.unflatten(1, grid), there
        head = getattr(self.lm.head, "visual", self.lm.head)
        for numbers, ids in self._part(head, sequence, where[skip:], sampling, seed, tokens):
            codes[:, numbers + skip] = self.lm.head.vocabulary.from_visual(ids)
            there[numbers.cpu() + skip] = True
            yield codes.unflatten(1, grid), there

    def _part(
        self, head: Head, sequence: Sequence, where: Tensor, sampling: Sampling, seed: int, tokens: Account
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers `(k,)` and ids `(B, k)` of the tokens that follow a sequence, after each pass."""
        steps = decode(
            self.lm.transformer,
            head,
            sequence,
            where,
            sampling,
            self.packer.without_prompt(sequence),
            seeded(list(range(seed, seed + len(sequence))), self.device),
            tokens.begin(len(where), self.device),
        )
        for numbers, ids in steps:
            tokens.add(ids)
            yield numbers, ids

    def _sound(self, given: Given, sequence: Sequence, sampling: Sampling, seed: int, tokens: Account) -> Tensor:
        """`(B, C, N)` that continues a sequence which asks for sound, level by level.

        Places of sound are no grid: where tokens are made in other groups than one by one, sound is not.
        """
        sound, heard = self.packer.sound, self.packer.sound.known(given)
        exact = isinstance(sampling.decoding, OneByOne | Jacobi)
        sampling = sampling if exact else replace(sampling, decoding=Jacobi())
        made = []
        for level, where in enumerate(sound.places(given, self.device)):
            ids = torch.zeros(len(given), len(where), dtype=torch.long, device=self.device)
            draw = seed + (level + 1) * LEVEL_SEEDS
            for numbers, newest in self._part(self.lm.head.sound[level], sequence, where, sampling, draw, tokens):
                ids[:, numbers] = newest
            sequence = sequence.followed_by(ids, where)
            made.append(ids)
        codes = sound.codes(torch.cat(made, 1))
        codes = codes if heard is None else torch.cat([heard, codes], 1)
        return self.audio.decode(codes)[..., : sound.samples(given)]

    def _how(self, sampling: Sampling | TokenDenoising | None) -> Sampling | TokenDenoising:
        """The way to sample; where it leaves it open in which passes, speculatively, which changes nothing."""
        sampling = self._sampling(sampling, Sampling if self.packer.space is None else TokenDenoising)
        if isinstance(sampling, MaskedSampling | MaskedDenoising) and not self.packer.masked:
            name, head = "masked" if self.packer.space is None else "masked_denoising", type(self.lm.head).__name__
            raise ValueError(f"sampler={name} needs a model with a masked head; this one's is {head}: leave it out")
        if isinstance(sampling, Sampling) and sampling.decoding is None and not self.packer.masked:
            return replace(sampling, decoding=Jacobi())
        return sampling

    def frames_played(self, given: Given) -> int:
        """To how many latent frames an action has to be told: those that are made, but for a clip's first."""
        leading = self.packer.prefix_frames(given)
        known = 1 + (leading - 1) // self.tokenizer.compression[0] if leading else 0
        return self.packer.grid(given)[0] - max(known, 1)

    def _played(self, given: Given, seed: int) -> Given:
        """With an action for each latent frame but the first: those of known frames are what the action model sees,
        those of the others are given, or else drawn."""
        if self.actions is None:
            if given.actions is not None:
                raise ValueError("this model is not played by actions; leave actions=... out")
            return given
        count, told, kinds = self.frames_played(given), given.actions, self.actions.codes
        if told is None:
            draws = seeded(list(range(seed, seed + len(given))), self.device)
            told = torch.stack([torch.randint(kinds, (count,), generator=g, device=self.device) for g in draws])
        if told.shape[1] != count:
            raise ValueError(
                f"actions has {told.shape[1]} numbers; this clip takes {count}, one for each latent frame after those "
                "that are known or the first"
            )
        if told.numel() and not 0 <= int(told.min()) <= int(told.max()) < kinds:
            wrong = int(told[(told < 0) | (told >= kinds)][0])
            raise ValueError(f"actions are numbers from 0 to {kinds - 1}; got {wrong}")
        leading = self.packer.prefix_frames(given)
        if leading > 1:
            told = torch.cat([self.actions.encode(given.video[:, :, :leading]), told], 1)
        return given.replace(actions=told)

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
        if self.packer.masked:
            make = fill if self.packer.space is None else fill_latents
        else:
            make = partial(draw_latents, positions=where)
        made = make(
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
        """Clips for what is given: a prompt, several, or a `Given` with known pixels, a condition or a sound.

        seed: sample i draws with seed + i, so it does not depend on its neighbours as long as no prompt of the batch
            takes more text slots (a multiple of 8 word pieces) than its own. progress: called with tokens
            made and tokens asked after each pass. made: a list that is filled with the ids `(B, k)` of each pass; one
            that was filled by a call that was interrupted is gone on from.
        """
        given, sampling = self._played(self._given(given, task), seed), self._how(sampling)
        if self.packer.masked or self.packer.space is not None:
            return self._at_once(given, task, sampling, seed, progress)
        sequence, tokens = self._begin(given, task, progress, made)
        video, audio, rate = given.video, given.audio, given.audio_rate
        if "video" in given.asks:
            codes, _ = deque(self._decode(given, sequence, sampling, seed, tokens), maxlen=1).pop()
            video = self.tokenizer.decode(codes)
        if "audio" in given.asks:
            if "video" in given.asks:
                known = self.packer.known_in(sequence).shape[1]
                ids = self.lm.head.vocabulary.to_visual(codes.flatten(1))[:, known:]
                sequence = self.packer.asking_for_sound(sequence, ids, given)
            audio, rate = self._sound(given, sequence, sampling, seed, tokens), self.audio.rate
        return Clip(video, given.fps, given.captions, audio, None if audio is None else rate)

    def _begin(
        self,
        given: Given,
        task: str,
        progress: Callable[[int, int], None] | None,
        made: list[Tensor] | None,
    ) -> tuple[Sequence, Account]:
        """What is given as a sequence, and the account of the tokens that are to follow."""
        sequence = self.packer.pack(given, self.task(task).marker)
        count = 0
        if "video" in given.asks:
            count += prod(self.packer.grid(given)) - self.packer.known_in(sequence).shape[1]
        if "audio" in given.asks:
            count += self.packer.sound.places(given)[..., 0].numel()
        return sequence, Account(made, count, progress)

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
        """The frames of `generate`, `(B, 3, T, H, W)` at a time, as soon as their tokens exist; sound is not made.

        Together they are what `generate` gives, in float32 to the last bit.
        """
        given, sampling = self._played(self._given(given, task), seed), self._how(sampling)
        if self.packer.masked or self.packer.space is not None:
            yield self._at_once(given, task, sampling, seed, progress).video
            return
        if "video" not in given.asks:
            raise ValueError(f"task={task} makes sound alone, and only frames are streamed; call generate")
        given = given.replace(asks=("video",))
        past, sent = {}, 0
        sequence, tokens = self._begin(given, task, progress, made)
        for codes, there in self._decode(given, sequence, sampling, seed, tokens):
            ready = int(there.unflatten(0, codes.shape[1:]).flatten(1).all(1).long().cumprod(0).sum())
            if ready > sent:
                yield self.tokenizer.decode(codes[:, sent:ready], past)
                sent = ready


def check_actions(actions: LatentActions | None, tokenizer: nn.Module, head: nn.Module) -> None:
    """ValueError where a latent action model does not fit the tokenizer and the head."""
    asked = getattr(head, "actions", 0)
    codes = 0 if actions is None else actions.codes
    if asked != codes:
        raise ValueError(
            f"the head knows {asked} actions and the latent action model has {codes}; set head.actions={codes} of "
            "head=masked, and stage.actions to the folder of a latent action model where that is not 0"
        )
    if actions is not None and actions.stride != tokenizer.compression[0]:
        raise ValueError(
            f"actions lead over {actions.stride} frames, a latent frame has {tokenizer.compression[0]}; "
            "train a latent action model with this latent_actions.stride"
        )


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
