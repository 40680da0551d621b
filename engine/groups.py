"""Which clips are trained on together: a group for each task and format, so that a step's sequences are of one length
(alternating gradient descent, VideoPoet, arXiv:2312.14125, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from reelm.data.module import Group
from reelm.tasks.formats import Format, Formats
from reelm.tasks.task import Mixture, Task, tasks_of


def groups(task: Task | Mixture, formats: Formats | None, tokens: Callable[[Format], int]) -> list[Group]:
    """The groups of a training.

    A step has as many tokens to make in every format, so shorter ones come in larger batches; how often steps are of a
    group is such that each format, and each task, has the share of clips that its weight says.

    tokens: of a clip of a format.
    """
    made = []
    for part in tasks_of(task):
        mixed = isinstance(task, Mixture)
        images = task.image_batch if mixed and part.frames == 1 else 1.0
        schedule = task.schedule(part) if mixed else None
        audio = getattr(part, "audio", False)
        plain = Group(part.name, 1.0, part.frames, part.controls, audio, batch=images, schedule=schedule)
        if formats is None:
            made.append(plain)
            continue
        ways = _formats_of(part, formats)
        usual, total = tokens(ways[0]), sum(way.weight for way in ways)
        for way in ways:
            larger = usual / tokens(way)
            share = way.weight / total / larger
            made.append(
                replace(
                    plain,
                    frames=way.frames,
                    size=way.size,
                    fps=way.fps,
                    batch=images * larger,
                    weight=share,
                    schedule=None if schedule is None else partial(_scaled, schedule=schedule, share=share),
                )
            )
    return made


def one_format_each(groups: Sequence[Group]) -> list[Group]:
    """A group of each task, of its formats in turn, so that few clips show all tasks and all formats."""
    ways: dict[str, list[Group]] = {}
    for group in groups:
        ways.setdefault(group.name, []).append(group)
    return [each[number % len(each)] for number, each in enumerate(ways.values())]


def _formats_of(task: Task, formats: Formats) -> list[Format]:
    """Those of the task's own length, where it has one: formats that then differ in nothing are one."""
    found: dict[tuple, Format] = {}
    for part in formats.parts:
        part = part if task.frames is None else replace(part, frames=task.frames)
        key = part.shape, part.fps if part.frames > 1 else None
        found[key] = replace(part, weight=part.weight + found[key].weight) if key in found else part
    return list(found.values())


def _scaled(progress: float, schedule: Callable[[float], float], share: float) -> float:
    return schedule(progress) * share
