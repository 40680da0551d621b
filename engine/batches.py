"""Samples of one call that are made together, and how what several such batches make becomes one again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.engine.interruption import Share
from reelm.lm.sequence import Sequence
from reelm.tasks.task import Given


@dataclass(frozen=True)
class Batch:
    """Samples whose sequences are of one length, whoever their neighbours are.

    given, sequence: of these samples. rows: their numbers in the call. seeds: of each. account: of their tokens.
    """

    given: Given
    sequence: Sequence
    rows: list[int]
    seeds: list[int]
    account: Share


def in_order(parts: list[Tensor], rows: list[list[int]]) -> Tensor:
    """The samples of several batches in the order of their numbers."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.tensor(sum(rows, []), device=parts[0].device).argsort()]


def in_step(streams: list[Iterator[Tensor]], rows: list[list[int]]) -> Iterator[Tensor]:
    """Pieces `(B, 3, T, H, W)` of all samples from streams of some of them, as soon as all are there."""
    if len(streams) == 1:
        yield from streams[0]
        return
    waiting: list[Tensor | None] = [None] * len(streams)
    while True:
        for i, stream in enumerate(streams):
            if waiting[i] is None or not waiting[i].shape[2]:
                waiting[i] = next(stream, None)
        if waiting[0] is None:  # all are equally long
            return
        count = min(piece.shape[2] for piece in waiting)
        yield in_order([piece[:, :, :count] for piece in waiting], rows)
        waiting = [piece[:, :, count:] for piece in waiting]
