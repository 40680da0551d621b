"""What a task is: how a clip splits into what the model is told and what it must make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from reelm.data.clip import Clip

ORDERS = {  # each latent frame is best made beside one that is known
    "forward": "from the first to the last",
    "backward": "from the last to the first",
    "last_first": "the last, and then the others from the first on",
}


def check_order(name: str, order: str) -> None:
    """ValueError where a task makes latent frames in an order that there is not."""
    if order not in ORDERS:
        raise ValueError(f"{name} makes frames in one of the orders {', '.join(ORDERS)}; got {order}")


@dataclass(frozen=True, eq=False)
class Given:
    """What the model is told about a batch of B clips.

    shape: frames, height and width of what is to be made.
    captions: one prompt a sample; "" where there is none.
    video: `(B, 3, T, H, W)` pixels in [-1, 1], of any T up to `shape[0]`; what is not known is 0. None: nothing known.
    known: `(B, 1, T, H, W)` bool, which pixels of `video` are known. The one convention for every task.
    condition: `(B, 3, T', H, W)` a video that says what to make without being part of it (depth and flow), or None.
    audio: `(B, C, N)` the sound that is known, from the beginning of the clip on, at `audio_rate` samples a second.
    actions: `(B, n)` int64 latent actions, which lead to the last n latent frames of the clip. None: none are told.
    asks: what is to be made: ("video",), ("audio",) or ("video", "audio").
    order: in which a language model makes the latent frames that are not known (`ORDERS`).
    """

    shape: tuple[int, int, int]
    captions: tuple[str, ...]
    video: Tensor | None = None
    known: Tensor | None = None
    condition: Tensor | None = None
    fps: float = 8.0
    audio: Tensor | None = None
    audio_rate: int | None = None
    asks: tuple[str, ...] = ("video",)
    actions: Tensor | None = None
    order: str = "forward"

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: list[int]) -> Given:
        """What is given for the samples of these numbers."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        changes = {name: v[rows] for name, v in tensors.items() if len(v) == len(self)}  # others are of all samples
        return self.replace(captions=tuple(self.captions[row] for row in rows), **changes)

    def replace(self, **changes) -> Given:
        return replace(self, **changes)

    def to(self, *args, **kwargs) -> Given:
        """The same with its tensors moved; a dtype applies to pixels, not to what is known."""

        def move(value):
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            device = torch._C._nn._parse_to(*args, **kwargs)[0]
            return value if device is None else value.to(device)

        return Given(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    @property
    def leading(self) -> int:
        """How many frames from the first on are wholly known, in every sample."""
        if self.known is None:
            return 0
        whole = self.known.flatten(3).all(-1)[:, 0].all(0)
        return int(whole.long().cumprod(0).sum())


class Task(Protocol):
    """How a clip splits. Tasks are pure: all chance comes from `generator`.

    name: of the task. marker: number of its task token, one for each kind of output (0 a clip from a prompt and its
    first frames, 1 inpainting, 2 outpainting, 3 stylization, 4 sound, 5 a clip with sound, 6 a clip that ends as it
    begins). frames: clip length it wants (None: what the data has). controls: names of the truths it needs in
    `Clip.controls`. A task that needs the clips' sound also has `audio`, which is true, and one that a prompt is enough
    for `from_prompt`.
    """

    name: str
    marker: int
    frames: int | None
    controls: tuple[str, ...]

    def split(self, clip: Clip, generator: torch.Generator | None = None) -> tuple[Given, Clip]: ...


def random_int(low: int, high: int, generator: torch.Generator | None) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def one_of(numbers: Sequence[int], generator: torch.Generator | None) -> int:
    """One of these numbers, each as probable."""
    return numbers[random_int(0, len(numbers) - 1, generator)]


def mask_video(clip: Clip, known: Tensor) -> tuple[Tensor, Tensor]:
    """The clip's pixels where `known` (broadcastable bool) is true, 0 elsewhere, and the full-size mask."""
    known = known.expand(len(clip), 1, *clip.video.shape[2:])
    return clip.video * known.to(clip.video.device), known


@dataclass(frozen=True)
class Mixture:
    """Several tasks with weights; itself what a training run is given.

    parts: the tasks by name. weights: how many clips of each, relative to the others; without one, a part is left out.
    image_first: share of the steps at the start in which `image_share` of the clips are images (VideoPoet, section 3.3:
    90 % in the first 25 % of the steps, 10 % later).
    """

    parts: Mapping[str, Task]
    weights: Mapping[str, float]
    image_first: float = 0.25
    image_share: tuple[float, float] = (0.9, 0.1)
    image_batch: float = 4.0
    name: str = "mixture"

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(self.parts)
        if unknown or min(self.weights.values(), default=0) < 0 or not any(self.weights.values()):
            raise ValueError(f"a mixture needs weights for some of {', '.join(self.parts)}; got {dict(self.weights)}")
        for name, task in self.parts.items():
            if task.name != name:
                raise ValueError(f"the mixture's part {name} is the task {task.name}; give both the same name")

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for name, task in self.parts.items() if self.weights.get(name, 0) > 0)

    def schedule(self, task: Task) -> Callable[[float], float]:
        """Weight of a task at each point of the training, progress running from 0 to 1."""
        image = task.frames == 1
        total = sum(self.weights[t.name] for t in self.tasks if (t.frames == 1) == image)
        alone = all((t.frames == 1) == image for t in self.tasks)
        within = self.weights[task.name] / total

        if alone:
            return partial(_in_turn, before=within, after=within, turn=0.0)
        early, late = (share / self.image_batch if image else 1 - share for share in self.image_share)
        # groups are drawn by the step, and an image step holds `image_batch` times as many clips
        return partial(_in_turn, before=within * early, after=within * late, turn=self.image_first)


def _in_turn(progress: float, before: float, after: float, turn: float) -> float:
    return before if progress < turn else after


def tasks_of(task: Task | Mixture) -> tuple[Task, ...]:
    return task.tasks if isinstance(task, Mixture) else (task,)
