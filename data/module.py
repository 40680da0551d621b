"""The data module: which clips a step trains on, as a pure function of the step, so that training resumes exactly."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import lightning as L
import numpy as np
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from reelm.data.clip import Clip


class ClipSource(Protocol):
    """What every dataset of clips offers."""

    def __len__(self) -> int: ...

    def get(self, index: int, frames: int | None = None, controls: Sequence[str] | None = None, draw: int = 0) -> Clip:
        """One clip; `frames` and `controls` override what the dataset was built with.

        Where a group asks for other sizes or rates than the dataset's, they come as `size` and `fps`, and `audio=True`
        where it asks for sound too; a source of one format, or without sound, need not have these.

        draw: number of the pass over the data. A source that leaves part of a clip to chance draws anew in each.
        """

    def sound(self, index: int, rate: int, frames: int | None = None, draw: int = 0) -> Clip:
        """The clip's stereo sound at `rate` samples a second; its video is a shape without pixels, which cost nothing.

        A source without sound need not have this.
        """

    def caption(self, index: int, frames: int | None = None) -> str:
        """The caption that `get` would return, without decoding or rendering."""


@dataclass(frozen=True)
class Group:
    """Clips that are asked for and trained on together: of one task, one length, with the same controls.

    weight: how often a step is of this group, relative to the others; `schedule(progress)`, where given, overrides it
        with a number for each point of the training, progress running from 0 to 1.
    audio: asks for the clips with their sound. sound: for their sound alone, at this many samples a second.
    size, fps: height and width, and frames a second, where they are not the source's own.
    batch: batch size relative to the module's (an image group can take several times as many).
    """

    name: str
    weight: float = 1.0
    frames: int | None = None
    controls: tuple[str, ...] = ()
    audio: bool = False
    size: tuple[int, int] | None = None
    fps: float | None = None
    batch: float = 1.0
    sound: int | None = None
    schedule: Callable[[float], float] | None = None

    def share(self, progress: float) -> float:
        return self.weight if self.schedule is None else self.schedule(progress)

    def options(self) -> dict[str, object]:
        """What is asked of `ClipSource.get`."""
        asked = {"audio": self.audio or None, "size": self.size, "fps": self.fps}
        given = {name: value for name, value in asked.items() if value is not None}
        return {"frames": self.frames, "controls": self.controls, **given}


@dataclass(frozen=True)
class Request:
    """One sample that a batch asks for."""

    index: int
    group: Group
    draw: int = 0


@dataclass(frozen=True)
class Batch:
    """The clips of one step and the name of their group."""

    name: str
    clip: Clip

    def to(self, *args, **kwargs) -> Batch:
        return Batch(self.name, self.clip.to(*args, **kwargs))


class Batches(Dataset):
    """The batches of requests to a source, made when they are asked for.

    requests: those of each batch. A lazy sequence of them is worked out where the batches are made, in the loader's
    processes: with several, each of these works out all windows of `GroupedBatches` in which it has a batch.
    """

    def __init__(self, source: ClipSource, requests: Sequence[list[Request]]) -> None:
        self.source, self.requests = source, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> Batch:
        requests = self.requests[number]
        return Batch(requests[0].group.name, Clip.stack([self._clip(request) for request in requests]))

    def _clip(self, request: Request) -> Clip:
        group = request.group
        if group.sound is not None:
            return self.source.sound(request.index, group.sound, frames=group.frames, draw=request.draw)
        return self.source.get(request.index, draw=request.draw, **group.options())


class GroupedBatches(Sequence[list[Request]]):
    """Batches of one group and of similar caption length, each a pure function of (seed, step).

    A window of `WINDOW` batches is drawn at a time from one group, sorted by caption length and dealt out in random
    order, so that text padding stays small without any state beyond the step. Passes over the data are permutations:
    no clip comes twice in a pass, and where all groups have the same batch size every clip comes once. Each pass is
    another draw of what the source leaves to chance.
    """

    WINDOW = 4

    def __init__(
        self,
        source: ClipSource,
        groups: Sequence[Group],
        batch_size: int,
        steps: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        length: Callable[[str], int] = len,
    ) -> None:
        if not groups or len(source) == 0:
            raise ValueError("nothing to train on: the data source is empty" if groups else "no group to train on")
        self.source, self.groups, self.batch_size, self.steps = source, tuple(groups), batch_size, steps
        self.seed, self.rank, self.ranks, self.length = seed, rank, ranks, length
        self._permutation: tuple[int, np.ndarray] | None = None
        self._window: tuple[int, list[list[Request]]] | None = None  # the newest

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Request]:
        """The batch of a step, for this rank."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        number, offset = divmod(step, self.WINDOW)
        if self._window is None or self._window[0] != number:
            self._window = (number, self.window(number))
        return self._window[1][offset]

    def _shuffled(self, position: int) -> tuple[int, int]:
        """The index at a position, and the pass it is of."""
        epoch, offset = divmod(position, len(self.source))
        if self._permutation is None or self._permutation[0] != epoch:
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.source))
            self._permutation = (epoch, order)
        return int(self._permutation[1][offset]), epoch

    def window(self, number: int) -> list[list[Request]]:
        """The batches of steps `number * WINDOW` and following, for this rank."""
        rng = np.random.default_rng((self.seed, 2, number))
        progress = min(number * self.WINDOW / max(self.steps, 1), 1.0)
        shares = np.array([group.share(progress) for group in self.groups])
        group = self.groups[rng.choice(len(shares), p=shares / shares.sum())]
        size = max(1, round(self.batch_size * group.batch)) * self.ranks
        most = max(round(self.batch_size * max(g.batch for g in self.groups)), 1) * self.ranks
        first = number * self.WINDOW * most  # positions are spaced by the largest window, so none comes twice
        clips = [self._shuffled(first + i) for i in range(self.WINDOW * size)]
        clips.sort(key=lambda clip: self.length(self.source.caption(clip[0], group.frames)))
        order = rng.permutation(self.WINDOW)
        batches = [clips[k * size : (k + 1) * size] for k in order]
        return [[Request(index, group, draw) for index, draw in batch[self.rank :: self.ranks]] for batch in batches]


def in_turn(
    source: ClipSource,
    groups: Sequence[Group],
    batch_size: int,
    clips: int,
    rank: int = 0,
    ranks: int = 1,
    length: Callable[[str], int] = len,
) -> list[list[Request]]:
    """Batches for validation: the first clips of the source for each group in turn, the same ones each time.

    clips: of all groups together, but each group has a batch at least. All ranks have equally many batches.
    """
    batches = []
    size = batch_size * ranks
    for group in groups:
        count = min(max(clips // len(groups), size), len(source))
        indices = sorted(range(count), key=lambda i: length(source.caption(i, group.frames)))
        for start in range(0, count, size):
            batch = indices[start : start + size]
            batch += indices[: -len(batch) % ranks] if count >= ranks else [batch[0]] * (-len(batch) % ranks)
            batches.append([Request(index, group) for index in batch[rank::ranks]])
    return batches


def outlive_one_sigterm(worker: int) -> None:
    """Clusters send SIGTERM to all processes of a job at once. The one that trains saves, and its loaders have to live
    until then; it ends them itself, or a second SIGTERM does."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class ClipData(L.LightningDataModule):
    """Loaders over any source of clips.

    Args:
        train, validation: datasets of clips (`ClipSource`).
        batch_size: clips a step on each process.
        workers: loader processes.
        seed: of the order of clips and groups.
        validation_clips: clips of `validation` to look at, in all groups together; a batch of each at least.
        root: where the data lie. Not read here: configs say it once by this name, and their datasets refer to it.

    The module that trains sets `groups` (and `text_length`) in its `setup`; by default there is one group of whole
    clips. Validation looks at `validation_groups`, or where these are None at the same.
    """

    def __init__(
        self,
        train: ClipSource,
        validation: ClipSource,
        batch_size: int = 16,
        workers: int = 0,
        seed: int = 0,
        validation_clips: int = 64,
        root: object = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("validation_clips", validation_clips)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be 1 or more, and a whole number")
        self.train, self.validation = train, validation
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.validation_clips = validation_clips
        self.groups: Sequence[Group] = (Group("clip"),)
        self.validation_groups: Sequence[Group] | None = None
        self.text_length: Callable[[str], int] = len

    def _loader(self, source: ClipSource, requests: Sequence[list[Request]], workers: int) -> StatefulDataLoader:
        return StatefulDataLoader(
            Batches(source, requests), batch_size=None, num_workers=workers,
            prefetch_factor=4 if workers else None, persistent_workers=False,
            worker_init_fn=outlive_one_sigterm,
            generator=torch.Generator(),  # so that making a loader draws nothing from the training's random numbers
        )  # fmt: skip

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> StatefulDataLoader:
        """An endless stream for practical purposes: as many batches as the trainer's `max_steps` asks for."""
        trainer, (rank, ranks) = self.trainer, self._rank()
        bounded = trainer is not None and trainer.max_steps > 0
        steps = trainer.max_steps if bounded else len(self.train) // self.batch_size
        steps = max(steps, 1) * (trainer.accumulate_grad_batches if trainer is not None else 1)
        if ranks > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("the loader shares out its batches itself; set trainer.use_distributed_sampler=false")
        batches = GroupedBatches(
            self.train, self.groups, self.batch_size, steps, self.seed, rank, ranks, self.text_length
        )
        return self._loader(self.train, batches, self.workers)

    def val_dataloader(self) -> StatefulDataLoader:
        rank, ranks = self._rank()
        groups = self.groups if self.validation_groups is None else self.validation_groups
        batches = in_turn(
            self.validation, groups, self.batch_size, self.validation_clips, rank, ranks, self.text_length
        )
        return self._loader(self.validation, batches, workers=0)
