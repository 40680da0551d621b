"""`VideoLM`: tokenizer, text model and language model joined."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.engine import seeds
from reelm.engine.batches import Batch, in_order, in_step
from reelm.engine.interruption import Account
from reelm.engine.video_model import VideoModel
from reelm.lm.compiled import Passes
from reelm.lm.decoding import OneByOne, decode
from reelm.lm.heads import Head
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.masked_diffusion import MaskedDenoising, MaskedTokenDiffusion, fill_latents
from reelm.lm.parallel import Blocks, Diagonal
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.speculative import Jacobi
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion, draw_latents
from reelm.lm.weighting import Weighting
from reelm.tasks.formats import Formats
from reelm.tasks.packing import Packer
from reelm.tasks.task import Given, Task
from reelm.tokenizers.latent_actions import LatentActions
from reelm.tokenizers.text import SentencePieceText, T5Text
from reelm.tokenizers.tiling import Tiled
from reelm.tokenizers.tokens import Tokens
from reelm.tokenizers.within_memory import decode_within_memory


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
        raster = lm.transformer.raster
        self.packer = Packer(tokenizer, text, lm.head.vocabulary, masked, continuous, formats, audio, raster)
        self._how(sampling)

    def lighten(self, dtype: str, compiled: bool = False) -> str:
        ordered = not self.packer.masked and self.packer.space is None and hasattr(self.lm.transformer, "blocks")
        if compiled and not ordered:
            raise ValueError("compile=true is for transformers that make codes in an order; leave it out")
        dtype = lighten(self.lm, dtype, compiled)
        self.lm.transformer.passes = Passes(self.lm.transformer) if compiled else None
        return dtype

    def loss(
        self,
        clip: Clip,
        task: str,
        unprompted: Tensor | bool = False,
        packed: bool = False,
        weighting: Weighting | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As of all models; packed: the clips in one row, without filling prompts up to the longest. weighting: how
        much each id counts; None: all alike."""
        given, target = self.task(task).split(clip)
        with torch.no_grad():
            tokens, sound = target.tokens, None
            if tokens is None and "video" in given.asks:
                tokens = self.tokenizer.encode(target.video)
            if self.actions is not None and target.frames > 1:
                given = given.replace(actions=self.actions.encode(target.video))
            if "audio" in given.asks:
                sound = self.packer.sound.encode(target.audio, target.audio_rate)
            pack = self.packer.pack_in_one_row if packed else self.packer.pack
            sequence = pack(given, self.task(task).marker, tokens, unprompted=unprompted, sound=sound)
            if weighting is not None:
                levels = getattr(self.lm.head, "levels", 0)
                sequence = sequence.replace(loss=weighting.of(sequence, self.lm.head.vocabulary, levels))
        if weighting is None or not weighting.prompt or not self.packer.prompted(given):
            return self.lm.loss(sequence)
        return self.lm.loss(sequence, unprompted=sequence.without_prompt(), prompt_weight=weighting.prompt)

    def _decode(self, batch: Batch, sampling: Sampling) -> Iterator[tuple[Tensor, Tensor]]:
        """The clips' codes `(B, t, h, w)` so far, and which of them `(t * h * w,)` are there, after each pass."""
        known, grid = self.packer.known_in(batch.sequence), self.packer.grid(batch.given)
        order, skip = self.packer.order(batch.given), known.shape[1]
        where, order = Tokens.positions(grid, self.device)[order[skip:]], order.cpu()
        codes = known.new_zeros(len(known), len(order))
        codes[:, order[:skip]] = self.lm.head.vocabulary.from_visual(known)
        there = torch.zeros(len(order), dtype=torch.bool)
        there[order[:skip]] = True
        yield codes.unflatten(1, grid), there
        head = self.lm.visual
        for numbers, ids in self._part(head, batch, batch.sequence, where, sampling):
            places = order[numbers.cpu() + skip]
            codes[:, places] = self.lm.head.vocabulary.from_visual(ids)
            there[places] = True
            yield codes.unflatten(1, grid), there

    def _part(
        self, head: Head, batch: Batch, sequence: Sequence, where: Tensor, sampling: Sampling, level: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers `(k,)` and ids `(B, k)` of the tokens that follow a sequence, after each pass.

        level: 0 for the video, from 1 on for sound.
        """
        steps = decode(
            self.lm.transformer,
            head,
            sequence,
            where,
            sampling,
            sequence.without_prompt(),
            seeded([seed + level * seeds.LEVEL for seed in batch.seeds], self.device),
            batch.account.begin(len(where), self.device),
        )
        for numbers, ids in steps:
            batch.account.add(ids)
            yield numbers, ids

    def _sound(self, batch: Batch, sequence: Sequence, sampling: Sampling) -> Tensor:
        """Codes `(B, t, levels)` of the sound that continues a sequence which asks for it, made level by level.

        Places of sound are no grid: where tokens are made in other groups than one by one, sound is not.
        """
        given, sound, heard = batch.given, self.packer.sound, self.packer.sound.known(batch.given)
        exact = isinstance(sampling.decoding, OneByOne | Jacobi)
        sampling = sampling.of_sound if exact else replace(sampling.of_sound, decoding=Jacobi())
        made = []
        for level, where in enumerate(sound.places(given, self.device)):
            ids = torch.zeros(len(given), len(where), dtype=torch.long, device=self.device)
            for numbers, newest in self._part(self.lm.head.sound[level], batch, sequence, where, sampling, level + 1):
                ids[:, numbers] = newest
            sequence = sequence.followed_by(ids, where)
            made.append(ids)
        codes = sound.codes(torch.cat(made, 1))
        return codes if heard is None else torch.cat([heard, codes], 1)

    def _how(self, sampling: Sampling | TokenDenoising | None, given: Given | None = None) -> Sampling | TokenDenoising:
        """The way to sample; where it leaves it open in which passes, speculatively, which changes nothing.

        given: where nothing of it prompts, guidance would be between two that are the same.
        """
        sampling = self._sampling(sampling, Sampling if self.packer.space is None else TokenDenoising)
        if isinstance(sampling, MaskedSampling | MaskedDenoising) and not self.packer.masked:
            name, head = "masked" if self.packer.space is None else "masked_denoising", type(self.lm.visual).__name__
            raise ValueError(f"sampler={name} needs a model with a masked head; this one's is {head}: leave it out")
        if self.audio is None and getattr(sampling, "sound_temperature", None) is not None:
            raise ValueError("this model makes no sound; leave sampler.sound_temperature out")
        decoding = getattr(sampling, "decoding", None)
        if decoding is not None and self.packer.masked:
            name = type(decoding).__name__
            raise ValueError(f"a masked head has passes of its own; leave the sampler with {name} out")
        if isinstance(decoding, Diagonal | Blocks) and self.lm.transformer.raster:
            transformer = type(self.lm.transformer).__name__
            raise ValueError(f"{transformer} makes tokens in the raster's order; leave sampler=diagonal and blocks out")
        if given is not None and not self.packer.prompted(given):
            sampling = replace(sampling, guidance=1.0)
        if isinstance(sampling, Sampling) and sampling.decoding is None and not self.packer.masked:
            return replace(sampling, decoding=Jacobi())
        return sampling

    def frames_played(self, given: Given) -> int:
        """To how many latent frames an action has to be told: those that are made, but for a clip's first."""
        return self.packer.grid(given)[0] - max(self.packer.known_latents(given), 1)

    def _played(self, given: Given, numbers: list[int]) -> Given:
        """With an action for each latent frame but the first: those of known frames are what the action model sees,
        those of the others are given, or else drawn."""
        if self.actions is None:
            if given.actions is not None:
                raise ValueError("this model is not played by actions; leave actions=... out")
            return given
        count, told, kinds = self.frames_played(given), given.actions, self.actions.codes
        if told is None:
            draws = seeded(numbers, self.device)
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

    def _at_once(self, batch: Batch, sampling: Sampling | TokenDenoising) -> Tensor:
        """Frames of models whose tokens are filled in from all sides, or are continuous.

        Of the former whole clips of tokens are kept: what is settled of one says too little of how to go on.
        """
        sequence, account, grid = batch.sequence, batch.account, self.packer.grid(batch.given)
        known = self.packer.known_in(sequence)
        order = self.packer.order(batch.given)
        where = Tokens.positions(grid, self.device)[order[known.shape[1] :]]
        options = {
            "sampling": sampling,
            "unconditional": sequence.without_prompt(),
            "generator": seeded(batch.seeds, self.device),
        }
        made = account.begin(len(where), self.device)
        if made is not None:
            account.add(made)
        if self.packer.masked:
            if made is None:
                make = fill if self.packer.space is None else fill_latents
                made = make(
                    self.lm.transformer, self.lm.head, sequence, callback=lambda n, _: account.tell(n), **options
                )
                account.add(made)
        else:
            made = draw_latents(
                self.lm.transformer,
                self.lm.head,
                sequence,
                where,
                callback=lambda _, newest: account.add(newest[:, None]),
                made=made,
                **options,
            )
        tokens = torch.cat([known, made], 1)[:, order.argsort()].unflatten(1, grid)
        if self.packer.space is not None:
            return self.packer.space.decode(tokens.movedim(-1, 1))
        return decode_within_memory(self.tokenizer, self.lm.head.vocabulary.from_visual(tokens))

    def _batches(
        self,
        given: Given,
        task: str,
        seed: int,
        progress: Callable[[int, int], None] | None,
        made: list[Tensor] | None,
        asks: tuple[str, ...],
    ) -> list[Batch]:
        """The samples in batches of which none depends on its neighbours; asks: what of them is to be made now."""
        rows = self.packer.alike(given)
        parts = [given] if len(rows) == 1 else [given[some] for some in rows]
        acting = seed + seeds.ACTIONS
        parts = [self._played(part, [acting + row for row in some]) for part, some in zip(parts, rows, strict=True)]
        sequences = [self.packer.pack(part, self.task(task).marker) for part in parts]
        total = 0
        for part, sequence in zip(parts, sequences, strict=True):
            if "video" in asks:
                total += len(part) * (prod(self.packer.grid(part)) - self.packer.known_in(sequence).shape[1])
            if "audio" in asks:
                total += len(part) * self.packer.sound.places(part)[..., 0].numel()
        account = Account(made, len(given), total, progress)
        return [
            Batch(part, sequence, some, [seed + row for row in some], account.of(some))
            for part, sequence, some in zip(parts, sequences, rows, strict=True)
        ]

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

        Prompts that take other text slots (each 8 word pieces) are worked on one batch after the other.

        seed: sample i draws with seed + i, so it does not depend on its neighbours (in int8, where they share a scale,
            but for rounding; with the maximal coupling of `Jacobi` it does).
        progress: called with tokens made and tokens asked of a clip after each pass.
        made: a list that is filled with the tokens of each pass (`Account`); one that was filled by a call that was
            interrupted is gone on from.
        """
        given = self._given(given, task)
        sampling = self._how(sampling, given)
        batches = self._batches(given, task, seed, progress, made, given.asks)
        clips = [self._clip(batch, sampling) for batch in batches]
        rows = [batch.rows for batch in batches]
        video = in_order([clip[0] for clip in clips], rows) if "video" in given.asks else given.video
        audio, rate = given.audio, given.audio_rate
        if "audio" in given.asks:
            audio, rate = in_order([clip[1] for clip in clips], rows), self.audio.rate
        return Clip(video, given.fps, given.captions, audio, None if audio is None else rate)

    def _clip(self, batch: Batch, sampling: Sampling | TokenDenoising) -> tuple[Tensor | None, Tensor | None]:
        """Frames and sound of a batch, where they are asked for."""
        if self.packer.masked or self.packer.space is not None:
            return self._at_once(batch, sampling), None
        return self._decoded(batch.given, *self._codes(batch, sampling))

    def _codes(self, batch: Batch, sampling: Sampling) -> tuple[Tensor | None, Tensor | None]:
        """Codes `(B, t, h, w)` of a batch's video and `(B, t, levels)` of its sound, where they are asked for."""
        codes, sequence, asks = None, batch.sequence, batch.given.asks
        if "video" in asks:
            codes, _ = deque(self._decode(batch, sampling), maxlen=1).pop()
        if "audio" not in asks:
            return codes, None
        if codes is not None:
            known = self.packer.known_in(sequence).shape[1]
            ids = self.lm.head.vocabulary.to_visual(codes.flatten(1))[:, known:]
            sequence = self.packer.asking_for_sound(sequence, ids, batch.given)
        return codes, self._sound(batch, sequence, sampling)

    def _decoded(self, given: Given, codes: Tensor | None, sound: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Frames and sound of their codes."""
        video = None if codes is None else decode_within_memory(self.tokenizer, codes)
        if sound is None:
            return video, None
        return video, decode_within_memory(self.audio, sound)[..., : self.packer.sound.samples(given)]

    @torch.inference_mode()
    def draw(self, given: Given, task: str, sampling: Sampling, seed: int = 0) -> tuple[Clip, Tensor | None]:
        """As `generate`: a clip with its own `tokens`, and the codes `(B, t, levels)` of its sound, where it is asked
        for. For heads that predict codes one by one."""
        given = self._given(given, task)
        sampling = self._how(sampling, given)
        batches = self._batches(given, task, seed, None, None, given.asks)
        made = [self._codes(batch, sampling) for batch in batches]
        rows = [batch.rows for batch in batches]
        codes, sound = (None if part[0] is None else in_order(list(part), rows) for part in zip(*made, strict=True))
        video, audio = self._decoded(given, codes, sound)
        rate = None if audio is None else self.audio.rate
        return Clip(
            given.video if video is None else video, given.fps, given.captions, audio, rate, tokens=codes
        ), sound

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
        given = self._given(given, task)
        sampling = self._how(sampling, given)
        if "video" not in given.asks:
            raise ValueError(f"task={task} makes sound alone, and only frames are streamed; call generate")
        batches = self._batches(given, task, seed, progress, made, ("video",))
        yield from in_step([self._frames(batch, sampling) for batch in batches], [batch.rows for batch in batches])

    def _frames(self, batch: Batch, sampling: Sampling | TokenDenoising) -> Iterator[Tensor]:
        """The frames of a batch as soon as their tokens exist."""
        if self.packer.masked or self.packer.space is not None:
            yield self._at_once(batch, sampling)
            return
        tokenizer, past, sent = Tiled(self.tokenizer), {}, 0  # one tile, or smaller ones where memory runs out
        for codes, there in self._decode(batch, sampling):
            ready = int(there.unflatten(0, codes.shape[1:]).flatten(1).all(1).long().cumprod(0).sum())
            if ready > sent:
                yield tokenizer.decode(codes[:, sent:ready], past)
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
