"""From what is given to the sequence that the transformer sees, and from its tokens back to a clip's tokens.

    <bos> <task> [format] <bot_i> text <eot_i> [<bov_i> condition <eov_i>] [<boa_i> known sound <eoa_i>]
        <bov_o> known tokens | tokens to predict [<boa_o> sound to predict]

Everything before the bar is the prefix. Because the tokenizer is causal, the tokens of the first known frames are the
first tokens of the clip itself, so T2V, image to video and continuation differ only in where the bar stands. Known
frames further on go in as images at their own time, several in a row as a clip, anything else that is known as a clip
with the unknown pixels grey, whose wholly unknown tokens are replaced by <mask>. Where the last frames are known,
latent frames may stand in another order (`Given.order`): backward continuation is made from the last to the first,
interpolations and loops begin with the last.

Text is padded with <pad> to a
multiple of 8, as ordinary tokens, so that no attention mask is needed; leaving the prompt out (classifier-free
guidance) means <pad> in place of the text, and where a clip is made from its sound or a sound from its clip, in place
of what is told. The end tokens are left out: the length is asked for, not predicted. A model of several formats is told
size, frame rate and length after the task. Where sound alone is to be made, <boa_o> is the last of the prefix.

For a masked head the tokens to predict are columns of the sequence from the start, and what is known beyond the leading
frames stands at its place among them (`Sequence.interior`; COMMIT, arXiv:2212.05199, section 3.2): the tokens of the
clip whose unknown frames are interpolated between the known ones, or whose unknown pixels are grey.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.lm.packed import in_one_row
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import Special, Vocabulary, task_token
from reelm.tasks.formats import Formats
from reelm.tasks.preparing import Preparing
from reelm.tasks.sound import SoundTokens
from reelm.tasks.task import Given
from reelm.tokenizers.latents import LatentSpace
from reelm.tokenizers.text import SentencePieceText, T5Text
from reelm.tokenizers.tokens import Tokens

FORMAT_ROW = 8
SOUND = Special.boa_o, 13  # where sound to make begins, and its row
TEXT_TIME, CONDITION_TIME = -2, 32  # text stands before time 0, condition tokens this many latent frames before theirs


Piece = tuple[Tensor, Tensor, Tensor | None]
"""Ids `(B, N)`, positions `(N, 3)`, and latents `(B, N, D)` where the model takes those."""


def interpolate(video: Tensor, known: Tensor) -> Tensor:
    """A clip whose unknown frames are filled in between the known ones in time (MAGVIT, appendix B.1).

    As it is where not whole frames are known, or not the same ones in each sample.
    """
    frames = known.flatten(3)
    whole, any_known = frames.all(-1)[:, 0].all(0), frames.any(-1)[:, 0].any(0)
    if not (whole == any_known).all():
        return video
    times, now = whole.nonzero()[:, 0], torch.arange(len(whole), device=video.device)
    after = times[torch.searchsorted(times, now).clamp_max(len(times) - 1)]
    before = times[(torch.searchsorted(times, now, right=True) - 1).clamp_min(0)]
    share = (now - before) / (after - before).clamp_min(1)
    return torch.lerp(video[:, :, before], video[:, :, after], share[:, None, None].to(video.dtype))


class Packer(Preparing):
    """Packs for one tokenizer, text model and vocabulary.

    Args:
        tokenizer: video tokenizer with `encode`, `grid`, `compression`.
        text: the text model.
        vocabulary: the language model's id space.
        masked: for a masked head; one of latents is told what is known beyond the leading frames before the bar.
        continuous: the tokens are latents (`Sequence.latents`), whose ids say no more than that.
        formats: those that the model tells apart; None: it is told none.
        audio: the tokenizer of sound; None: the model knows none.
        raster: the model sees what is earlier in the raster, so clips are made in its order whatever their task says.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        vocabulary: Vocabulary,
        masked: bool = False,
        continuous: bool = False,
        formats: Formats | None = None,
        audio: nn.Module | None = None,
        raster: bool = False,
    ) -> None:
        super().__init__(tokenizer, text)
        self.vocabulary, self.masked, self.formats, self.raster = vocabulary, masked, formats, raster
        self.sound = None if audio is None else SoundTokens(audio, vocabulary, tokenizer.compression[0])
        self.space = LatentSpace(tokenizer) if continuous else None
        self.refines = masked and not continuous  # tokens of what is known stand in the places of those to make

    def _text(self, captions: tuple[str, ...], drop: Tensor, slots: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ids `(B, slots)`, and vectors and their mask where the text model embeds the text itself, which is dropped
        here already."""
        if self.text.vocabulary:
            rows = [[self.vocabulary.text_range.start + i for i in row] for row in self.text.encode(list(captions))]
            rows = [row + [int(Special.pad)] * (slots - len(row)) for row in rows]
            return torch.tensor(rows, device=drop.device)[:, :slots], None, None
        drop = drop | torch.tensor([not caption for caption in captions], device=drop.device)
        vectors, mask = (x.to(drop.device) for x in self.text(list(captions)))
        short = slots - vectors.shape[1]
        vectors, mask = F.pad(vectors.float(), (0, 0, 0, short)), F.pad(mask, (0, short))
        ids = torch.full(mask.shape, int(Special.text), device=drop.device)
        return ids, vectors, mask & ~drop[:, None]

    def _conditions(self, given: Given, leading: int) -> list[Piece]:
        """Each piece of what is known beyond the leading frames."""
        pieces = []
        if given.condition is not None:
            pieces.append(self._video_tokens(given.condition))
        if self.refines or not self._knows_beyond(given, leading):
            return pieces
        frames = given.known[:, :, leading:].flatten(3)
        whole = frames.all(-1).all(0)[0]
        if (whole == frames.any(-1).any(0)[0]).all():  # whole frames only: clips and images at their time
            for start, stop in self._stretches((leading + whole.nonzero()[:, 0]).tolist()):
                ids, positions, latents = self._video_tokens(given.video[:, :, start:stop])
                time = -(-start // self.tokenizer.compression[0])
                pieces.append((ids, positions + torch.tensor([time, 0, 0], device=ids.device), latents))
            return pieces
        pieces.append(self._known_tokens(given.video, given.known))
        return pieces

    def _knows_beyond(self, given: Given, leading: int) -> bool:
        known = given.known
        return known is not None and known.shape[2] > leading and bool(known[:, :, leading:].any())

    def _known_tokens(self, video: Tensor, known: Tensor) -> Piece:
        """A video's tokens, <mask> where none of their pixels are known."""
        ids, positions, latents = self._video_tokens(video)
        grid = self.tokenizer.grid(*video.shape[2:])
        known = F.adaptive_max_pool2d(known[:, 0].float(), grid[1:])  # any known pixel of the supervoxel
        step = self.tokenizer.compression[0]
        later = [known[:, i : i + step].amax(1, keepdim=True) for i in range(1, known.shape[1], step)]
        per_latent = torch.cat([known[:, :1], *later], 1)
        return torch.where(per_latent.flatten(1) > 0, ids, int(Special.mask)), positions, latents

    def _interior(self, given: Given, leading: int) -> Tensor | None:
        """Ids of the whole grid `(B, N)`: tokens of what is known, <mask> elsewhere; None where no more is known than
        the leading frames."""
        if not self.refines or not self._knows_beyond(given, leading):
            return None
        missing = given.shape[0] - given.video.shape[2]
        video, known = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (given.video, given.known))
        return self._known_tokens(interpolate(video, known), known)[0]

    def _stretches(self, frames: list[int]) -> list[tuple[int, int]]:
        """First and last-plus-one of the clips of `1 + step * k` frames that known frames make: of each row of them as
        much as ends with its last frame, and what is before that frame by frame."""
        rows: list[list[int]] = []
        for frame in frames:
            if not rows or frame > rows[-1][-1] + 1:
                rows.append([])
            rows[-1].append(frame)
        found = []
        for row in rows:
            alone = (len(row) - 1) % self.tokenizer.compression[0]
            found += [(frame, frame + 1) for frame in row[:alone]] + [(row[alone], row[-1] + 1)]
        return found

    def _video_tokens(self, video: Tensor) -> Piece:
        tokens = self.tokenizer.encode(video)
        ids, latents = self._ids(tokens.flatten(1, 3))
        return ids, Tokens.positions(tuple(tokens.shape[1:4]), tokens.device), latents

    def _ids(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids `(B, N)` and, where the model takes latents, these `(B, N, D)` of tokens `(B, N)` or `(B, N, D)`."""
        if self.space is None:
            return self.vocabulary.to_visual(tokens), None
        latents = self.space.points(tokens[:, :, None, None]).flatten(2).transpose(1, 2)
        return torch.full(latents.shape[:2], int(Special.latent), device=latents.device), latents

    def known_tokens(self, given: Given) -> Tensor | None:
        """Tokens of the leading known frames `(B, N)` or `(B, N, D)`, or None."""
        leading = self.prefix_frames(given)
        return self.tokenizer.encode(given.video[:, :, :leading]).flatten(1, 3) if leading else None

    def known_in(self, sequence: Sequence) -> Tensor:
        """The known tokens that a sequence without targets ends with: ids `(B, N)`, or latents `(B, N, D)`."""
        start = int((sequence.ids[0] == int(Special.bov_o)).nonzero()[-1]) + 1
        tokens = sequence.ids if sequence.latents is None else sequence.latents
        return tokens[:, start : sequence.length - int(sequence.loss[0].sum())]

    def order(self, given: Given) -> Tensor:
        """The tokens of a clip in the order of making, those of the leading known frames first, as their numbers `(N,)`
        in raster order."""
        grid = self.grid(given)
        numbers = torch.arange(prod(grid), device=self.tokenizer.device)
        if given.order == "forward" or self.masked or self.raster:
            return numbers
        first = self.known_latents(given)
        frames = torch.arange(first, grid[0])
        frames = frames.flip(0) if given.order == "backward" else frames.roll(1)
        return numbers.unflatten(0, (grid[0], -1))[torch.cat([torch.arange(first), frames])].flatten()

    def prompted(self, given: Given) -> bool:
        """Whether there is a prompt, without which something else would be expected."""
        return any(given.captions) or self._source_ids(given) is not None

    def _source_ids(self, given: Given) -> range | None:
        """Ids of what is told where the other of video and sound alone is to be made: they prompt as a text does."""
        if given.asks == ("video",) and given.audio is not None:
            return self.vocabulary.audio_range
        return self.vocabulary.visual_range if given.asks == ("audio",) and given.video is not None else None

    def _prompt(self, ids: Tensor, prefix: int, given: Given) -> Tensor:
        """`(B, L)` bool: which ids say what is to be made (`Sequence.prompt`)."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for kind in (self.vocabulary.text_range, self._source_ids(given)):
            if kind is not None:
                found[:, :prefix] |= (ids[:, :prefix] >= kind.start) & (ids[:, :prefix] < kind.stop)
        return found

    def pack(
        self,
        given: Given,
        marker: int,
        target: Tensor | None = None,
        unprompted: Tensor | bool = False,
        slots: int | None = None,
        sound: Tensor | None = None,
    ) -> Sequence:
        """The sequence of a batch.

        target: tokens of the whole clip `(B, t, h, w)` or `(B, t, h, w, D)` for training; without it the sequence ends
            with its prefix, or for a masked head with a <mask> for each token to make.
        unprompted: `(B,)` bool, whose prompts are left out; True for all.
        slots: text slots, where not those of the longest prompt.
        sound: codes of the whole clip's sound `(B, t, levels)` for training, where sound is asked for.
        """
        batch = len(given)
        grid = self.grid(given)
        per_frame = grid[1] * grid[2]
        device = self.tokenizer.device
        order = self.order(given)
        drop = torch.as_tensor(unprompted, device=device).expand(batch)
        text, context, context_mask = self._text(given.captions, drop, slots or self.slots(given.captions))

        heard, asks_video = self._heard(given), "video" in given.asks

        if not asks_video:
            tokens, known, latents = None, 0, 0
        elif target is not None:
            latents = self.known_latents(given)
            tokens = target.flatten(1, 3)[:, order]
            known = latents * per_frame
        else:
            tokens = self.known_tokens(given)
            known = 0 if tokens is None else tokens.shape[1]
            latents = known // per_frame
        used = 0 if latents == 0 else 1 + (latents - 1) * self.tokenizer.compression[0]

        ids: list[Tensor] = []
        positions: list[Tensor] = []
        points: list[Tensor] = []

        def add(new_ids: Tensor, new_positions: Tensor, new_latents: Tensor | None = None) -> None:
            ids.append(new_ids.expand(batch, -1))
            positions.append(new_positions)
            if self.space is not None:
                none = torch.zeros(batch, new_ids.shape[1], self.space.channels, device=device)
                points.append(none if new_latents is None else new_latents)

        def add_special(token: int, row: int) -> None:
            add(torch.tensor([[int(token)]], device=device), torch.tensor([[TEXT_TIME, row, 0]], device=device))

        add_special(Special.bos, 0)
        add_special(task_token(marker), 1)
        for row, token in enumerate(self.formats.tokens(given.shape, given.fps, grid[0]) if self.formats else ()):
            add_special(token, FORMAT_ROW + row)
        add_special(Special.bot_i, 2)
        column = torch.arange(text.shape[1], device=device)
        first = sum(part.shape[1] for part in ids)
        add(text, torch.stack([torch.full_like(column, TEXT_TIME), torch.full_like(column, 3), column], -1))
        add_special(Special.eot_i, 4)
        conditions = self._conditions(given, used)
        if conditions:
            add_special(Special.bov_i, 5)
            for condition_ids, where, of in conditions:
                add(condition_ids, where - torch.tensor([CONDITION_TIME, 0, 0], device=device), of)
            add_special(Special.eov_i, 6)
        if heard is not None:
            add_special(Special.boa_i, 11)
            where = self.sound.positions(0, heard.shape[1], given.fps, device).flatten(0, 1)
            add(self.sound.ids(heard), where - torch.tensor([CONDITION_TIME, 0, 0], device=device))
            add_special(Special.eoa_i, 12)
        add_special(*((Special.bov_o, 7) if asks_video else SOUND))
        prefix = sum(part.shape[1] for part in ids) + known
        where = Tokens.positions(grid, device)[order] if asks_video else self.sound.places(given, device).flatten(0, 1)
        count = 0 if tokens is None else tokens.shape[1]
        if tokens is not None:
            new_ids, new_latents = self._ids(tokens)
            add(new_ids, where[:count], new_latents)
        if self.masked:
            missing = where[count:]
            add(torch.full((1, len(missing)), int(Special.mask), device=device), missing)
        if sound is not None:
            if asks_video:
                add_special(*SOUND)
            places = self.sound.places(given, device)
            add(self.sound.ids(sound[:, -places.shape[1] :]), places.flatten(0, 1))

        all_ids = torch.cat(ids, 1)
        loss = torch.zeros_like(all_ids, dtype=torch.bool)
        loss[:, prefix:] = all_ids[:, prefix:] != int(Special.boa_o)
        interior = self._interior(given, used)
        if interior is not None:
            interior = F.pad(interior, (all_ids.shape[1] - interior.shape[1], 0))
            interior = torch.where(loss, interior, int(Special.mask))
        stacked = torch.cat(positions)
        # the site that each position predicts: the next one's, for the last one the next of the grid
        following = where[count] if count < len(where) else stacked[-1]
        next_positions = torch.cat([stacked[1:], following[None]])
        prompt = self._prompt(all_ids, prefix, given)
        return Sequence(
            ids=torch.where(drop[:, None] & prompt, int(Special.pad), all_ids),
            positions=stacked.expand(batch, -1, -1),
            next_positions=next_positions.expand(batch, -1, -1),
            prefix=prefix,
            loss=loss,
            context=context,
            context_mask=context_mask,
            interior=interior,
            latents=torch.cat(points, 1) if points else None,
            actions=self._actions(given, all_ids.shape[1], per_frame),
            prompt=prompt,
            text=(first, first + text.shape[1]),
        )

    def pack_in_one_row(
        self,
        given: Given,
        marker: int,
        target: Tensor | None = None,
        unprompted: Tensor | bool = False,
        sound: Tensor | None = None,
    ) -> Sequence:
        """The sequences of `pack` as segments of one row, each with the text slots of its own prompt alone."""
        drop = torch.as_tensor(unprompted, device=self.tokenizer.device).expand(len(given))
        slots = [self.text_length(caption) for caption in given.captions]
        parts = []
        for count in sorted(set(slots)):
            rows = [row for row, own in enumerate(slots) if own == count]
            tokens, heard = (None if t is None else t[rows] for t in (target, sound))
            parts.append(self.pack(given[rows], marker, tokens, drop[rows], count, heard))
        return in_one_row(parts)

    def _actions(self, given: Given, length: int, per_frame: int) -> Tensor | None:
        """The action of each column: the last ones are the clip's own."""
        if given.actions is None:
            return None
        told = given.actions.to(self.tokenizer.device).repeat_interleave(per_frame, 1)
        return F.pad(told, (length - told.shape[1], 0), value=-1)

    def _heard(self, given: Given) -> Tensor | None:
        """Codes of the sound that is known; ValueError where the model knows no sound."""
        if self.sound is None and (given.audio is not None or "audio" in given.asks):
            raise ValueError("this model neither hears nor makes sound; it was trained without an audio tokenizer")
        return None if self.sound is None else self.sound.known(given)

    def asking_for_sound(self, sequence: Sequence, made: Tensor, given: Given) -> Sequence:
        """A sequence whose video is made, ids `(B, n)`, and whose sound is to be made now."""
        where = Tokens.positions(self.grid(given), made.device)
        where = where[len(where) - made.shape[1] :]
        token, row = SOUND
        begin = torch.full_like(made[:, :1], int(token))
        place = torch.tensor([[TEXT_TIME, row, 0]], device=made.device)
        return sequence.followed_by(torch.cat([made, begin], 1), torch.cat([where, place]))
