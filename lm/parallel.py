"""Groups of tokens in one pass, each token drawn without knowing the others of its group: fast, and not exact.

Places are data, so weights that were trained in raster order can be asked for places in another order. Each token is
predicted by the column of one that was made before it, which is told the place asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from reelm.lm.decoding import Noise, Run

Place = tuple[int, int, int]


@dataclass(frozen=True)
class Diagonal:
    """The anti-diagonals of a frame, one after the other; of frames, each after the one before."""

    def __call__(self, run: Run, noise: Noise, made: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        places = _places(run)
        order = sorted(range(run.steps), key=lambda i: (places[i][0], places[i][1] + places[i][2], places[i][1]))
        groups = [list(g) for _, g in groupby(order, lambda i: (places[i][0], places[i][1] + places[i][2]))]
        yield from _in_groups(run, noise, made, groups, {})


@dataclass(frozen=True)
class Blocks:
    """Regions of a frame side by side: a token of each region in one pass (PAR, arXiv:2412.15119).

    The first tokens of a frame's regions are made one after the other.

    rows, columns: number of regions in each direction.
    """

    rows: int = 2
    columns: int = 2

    def __post_init__(self) -> None:
        if not all(isinstance(count, int) and count >= 1 for count in (self.rows, self.columns)):
            raise ValueError(
                f"rows and columns of blocks are whole numbers from 1 on; got {self.rows} and {self.columns}"
            )

    def __call__(self, run: Run, noise: Noise, made: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        places = _places(run)
        high, wide = (-(-(max(p[axis] for p in places) + 1) // n) for axis, n in ((1, self.rows), (2, self.columns)))
        key, before, last = {}, {}, {}
        for i, (time, row, column) in enumerate(places):
            local, region = (row % high, column % wide), (row // high, column // wide)
            key[i] = (time, *local, *(region if local == (0, 0) else ()))
            before[i] = last.get(region, i - 1)  # the one before it in its own region
            last[region] = i
        order = sorted(range(run.steps), key=lambda i: (*key[i], i))
        yield from _in_groups(run, noise, made, [list(g) for _, g in groupby(order, key.__getitem__)], before)


def _places(run: Run) -> list[Place]:
    """Places, with the number of the frame in the order of making as time."""
    places = run.positions[0].tolist()
    frames = {time: i for i, time in enumerate(dict.fromkeys(time for time, _, _ in places))}
    return [(frames[time], row, column) for time, row, column in places]


def _in_groups(
    run: Run, noise: Noise, made: Tensor, groups: list[list[int]], before: dict[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Makes the tokens numbered in each group in one pass; the first group is a single token.

    A token is predicted by the column to its left, else by that which `before` names, else by the one above it, else by
    the newest, if these were made. A column that predicts two is read twice, and the copy is dropped.
    """
    places = _places(run)
    number = {place: i for i, place in enumerate(places)}
    ids = torch.zeros(run.batch, run.steps, dtype=torch.long, device=made.device)
    unread: list[int] = []
    done: set[int] = set()
    count = 0
    for group in groups:
        asked = dict.fromkeys(unread)  # what the column of each new token predicts
        copies: list[tuple[int, int]] = []
        for target in group if done else ():
            time, row, column = places[target]
            near = (number.get((time, row, column - 1)), before.get(target), number.get((time, row - 1, column)))
            parent = next((n for n in near if n in done), unread[-1])
            if parent in asked and asked[parent] is None:
                asked[parent] = target
            else:
                copies.append((parent, target))
        columns = [*((n, n if t is None else t) for n, t in asked.items()), *copies]
        of = torch.tensor([n for n, _ in columns], dtype=torch.long, device=ids.device)
        targets = [t for _, t in columns] or group
        hidden = run.read(ids[:, of], of, torch.tensor(targets, device=ids.device))
        chosen = [targets.index(target) for target in group]
        here = torch.tensor(group, device=ids.device)
        new = run.choose(hidden[:, chosen], here, noise.draw(group))
        if count + len(group) <= made.shape[1]:  # it was drawn before an interruption
            new = made[:, count : count + len(group)]
        ids[:, here] = new
        count += len(group)
        run.forget(len(done))
        done.update(group)
        unread = group
        yield here, new
        noise.drop(min(set(range(run.steps)) - done, default=run.steps))
