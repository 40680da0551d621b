"""`Sequence`: what the transformer sees."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reelm.lm.vocabulary import Special

Segments = tuple[tuple[int, int], ...]  # columns and prefix of each sequence of a packed row


@dataclass(frozen=True, eq=False)
class Sequence:
    """A batch of token sequences of one length and one prefix, or a packed row of several of different ones.

    The columns before `prefix` see each other in both directions; the rest is causal. The number is the same for the
    whole batch: short texts are filled up with ordinary `<pad>` tokens inside the prefix, so that no padding mask
    exists anywhere.

    ids: `(B, L)` int64 of the one id space (vocabulary.py).
    positions: `(B, L, 3)` int64: time, row and column of each token. Text may count its words by negative times, so
        that its places are not those of the video.
    prefix: number of columns with attention in both directions.
    loss: `(B, L)` bool: which ids are to be predicted (from the column before), or float: how much each of them counts
        (weighting.py); none of them inside the prefix. None: nothing is.
    next_positions: `(B, L, 3)`: the place of the token that each column is to predict. None: that of the next column
        (the last column repeats its own).
    context: `(B, N, D)` embedded text for the N columns of each row whose id is `Special.text`, or None.
    context_mask: `(B, N)` bool: which vectors of the context count. None: all.
    interior: `(B, L)` int64: for a masked head, the tokens of what is known of an id's place, which stand there while
        the id is hidden; `<mask>` where nothing is known. None: nothing is anywhere.
    latents: `(B, L, D)` float: the continuous tokens of the columns whose id is `Special.latent`, 0 elsewhere. None:
        there are none.
    actions: `(B, L)` int64: for a masked head, the number of the action that leads to the frame of a column, -1 where
        none does. None: none does anywhere.
    prompt: `(B, L)` bool: the ids that say what is to be made, which guidance leaves out (`without_prompt`). None: none
        does, or only the context.
    text: first column of the text and the one after its last, the same in all rows, for transformers that attend to
        it apart from the sequence. None: there is no text, or it is not told which columns it has.
    segments: columns and prefix of each sequence of a packed row (packed.py), which is the only row; `prefix` is then
        0. None: each row is one sequence.
    """

    ids: Tensor
    positions: Tensor
    prefix: int
    loss: Tensor | None = None
    next_positions: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    interior: Tensor | None = None
    latents: Tensor | None = None
    actions: Tensor | None = None
    prompt: Tensor | None = None
    text: tuple[int, int] | None = None
    segments: Segments | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.positions.shape != (*self.ids.shape, 3):
            raise ValueError(
                f"ids are (B, L) and positions (B, L, 3); got {tuple(self.ids.shape)} and {tuple(self.positions.shape)}"
            )
        if not 0 <= self.prefix <= self.ids.shape[1]:
            raise ValueError(f"a prefix of {self.prefix} columns does not fit a sequence of {self.ids.shape[1]}")
        if self.segments is not None and (len(self.ids), self.prefix, sum(n for n, _ in self.segments)) != (
            1, 0, self.length,
        ):  # fmt: skip
            raise ValueError(f"segments {self.segments} do not make up one row of {self.length} columns")
        if self.loss is not None and self.loss.device.type == "cpu":
            start = 0
            for length, prefix in self.segments or ((self.length, self.prefix),):
                if self.loss[:, start : start + max(prefix, 1)].any():
                    raise ValueError(
                        f"ids to predict lie inside the prefix of {prefix} columns, where they can be seen"
                    )
                start += length
        if self.next_positions is None:
            following = torch.cat([self.positions[:, 1:], self.positions[:, -1:]], 1)
            object.__setattr__(self, "next_positions", following)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Number of columns."""
        return self.ids.shape[1]

    def replace(self, **changes) -> Sequence:
        return replace(self, **changes)

    def followed_by(self, ids: Tensor, positions: Tensor) -> Sequence:
        """With more columns after its prefix: ids `(B, n)` at positions `(n, 3)`; none is to be predicted."""
        more = positions.expand(len(self), -1, -1)
        return self.replace(
            ids=torch.cat([self.ids, ids], 1),
            positions=torch.cat([self.positions, more], 1),
            next_positions=None,
            loss=None,
            prompt=None if self.prompt is None else F.pad(self.prompt, (0, ids.shape[1])),
        )

    def without_prompt(self) -> Sequence:
        """The same with `<pad>` in place of its prompt, for classifier-free guidance."""
        told, mask = self.prompt, self.context_mask
        return self.replace(
            ids=self.ids if told is None else torch.where(told, int(Special.pad), self.ids),
            context_mask=None if mask is None else torch.zeros_like(mask),
        )

    def without_text(self) -> Sequence:
        """Where the columns are without those of the text; it has no more to be filled in or predicted."""
        start, stop = self.text

        def rest(x: Tensor) -> Tensor:
            return torch.cat([x[:, :start], x[:, stop:]], 1)

        ids, positions, following = map(rest, (self.ids, self.positions, self.next_positions))
        prefix = self.prefix - max(min(stop, self.prefix) - start, 0)
        return Sequence(ids, positions, prefix, next_positions=following)

    def to(self, *args, **kwargs) -> Sequence:
        """The same sequence with its tensors moved; a dtype applies to what is of floats alone."""

        def move(value):
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            device = torch._C._nn._parse_to(*args, **kwargs)[0]
            return value if device is None else value.to(device)

        return Sequence(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def __getitem__(self, rows: slice) -> Sequence:
        """A batch of the chosen rows."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Sequence(**{n: v[rows] if isinstance(v, Tensor) else v for n, v in values.items()})

    @staticmethod
    def cat(parts: list[Sequence]) -> Sequence:
        """One batch from several of the same length and prefix."""
        first = parts[0]
        for part in parts[1:]:
            if (part.length, part.prefix, part.text) != (first.length, first.prefix, first.text):
                raise ValueError(
                    f"sequences of one batch differ: {first.length} columns with a prefix of {first.prefix}, "
                    f"{part.length} with {part.prefix}; fill the shorter text with <pad>"
                )
        tensors = {}
        for name in (f.name for f in fields(Sequence) if f.name not in ("prefix", "text", "segments")):
            values = [getattr(part, name) for part in parts]
            absent = [value is None for value in values]
            if any(absent) and not all(absent):
                raise ValueError(f"either all sequences of one batch have {name} or none has")
            tensors[name] = None if any(absent) else torch.cat(values)
        return first.replace(**tensors)
