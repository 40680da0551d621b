"""Tasks one after the other, each given what the one before it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.engine import seeds
from reelm.engine.generation import lengths, make
from reelm.engine.inputs import NEEDS, SOUNDING, Inputs
from reelm.engine.interruption import Windows
from reelm.engine.video_model import VideoModel


def make_chain(
    model: VideoModel, steps: Sequence[tuple[str, Inputs]], made: list[list[Tensor]] | None = None, **options: Any
) -> Clip:
    """Clips of several tasks, each of which is given what the one before it made (VideoPoet, section 5.4).

    steps: tasks and their inputs, without what comes from the task before. made, options: those of `make`, for all
        steps together.
    """
    for task, _ in steps:  # before anything is made
        if len(steps) == 1 and model.task(task).frames == 1 and options.get("frames") not in (None, 1):
            raise ValueError(f"task={task} makes a picture; leave frames=... and seconds=... out")
        lengths(model, task, *(options.get(name) for name in ("frames", "size", "fps")))
    clip, windows, seed = None, Windows(made), options.pop("seed", 0)
    for link, (task, inputs) in enumerate(steps):
        inputs = inputs if clip is None else inputs.after(clip, task)
        if len(steps) > 1 and not model.prompted(task):  # what is said of the whole chain is no mistake here
            inputs = replace(inputs, prompt="")
        clip = make(model, task, inputs, seed=seed + link * seeds.LINK, made=windows, **options)
    return clip


def chain_of(links: Sequence[str | Mapping[str, Any]], inputs: Inputs) -> list[tuple[str, Inputs]]:
    """The steps of a chain, each with those of the inputs that it makes use of.

    links: names of tasks, or mappings that also hold inputs of their own: `{task: stylization, prompt: in neon style}`.
    Raises ValueError for a chain that cannot be, or an input of no use in it.
    """
    if isinstance(links, (str, Mapping)) or not isinstance(links, Sequence):
        raise ValueError(f"chain={links} is no list; write it as one, such as chain=[t2i,i2v]")
    usual = {field.name: field.default for field in fields(Inputs)}
    steps: list[tuple[str, Inputs]] = []
    for link in links:
        if not isinstance(link, (str, Mapping)):
            raise ValueError(f"a link of chain is a task or {{task: ..., and inputs}}; got {link}")
        own = {"task": link} if isinstance(link, str) else dict(link)
        task = own.pop("task", None)
        if not task or not set(own) <= set(usual):
            wrong = min(set(own) - set(usual), default="no task")
            raise ValueError(f"a link of chain is a task or {{task: ..., and inputs}}; got one with {wrong}")
        if task not in NEEDS:
            raise ValueError(f"chain has the task {task}, which there is not; tasks are {', '.join(NEEDS)}")
        for name, value in own.items():
            kinds = (int, float) if isinstance(usual[name], float) else (str, Clip)
            if not isinstance(value, kinds) or isinstance(value, bool):
                what = "a number" if isinstance(usual[name], float) else "a text"
                raise ValueError(f"{name}={value} of {task} in chain is not {what}; write it as one")
        own = {"start": 0.0, **own} if steps else own  # that of the first clip is none of the clips made of it
        mine = replace(inputs.alone(task), **own)
        if steps and task in ("a2v", "av_continuation") and steps[-1][0] not in SOUNDING:
            raise ValueError(f"{task} in chain goes on from sound, and {steps[-1][0]} before it makes none")
        if steps:
            slot = Inputs.slot(task)
            if slot in own:
                raise ValueError(f"{task} in chain goes on from what is made before it; leave its {slot}=... out")
            replace(mine, **{slot: _BLANK}).check(task)
            mine = replace(mine, **{slot: None})
        else:
            mine.check(task)
        steps.append((task, mine))
    for name in ("image", "last", "video", "mask", "audio"):
        if getattr(inputs, name) and not any(getattr(mine, name) for _, mine in steps):
            raise ValueError(f"no task of chain={[task for task, _ in steps]} has a use for {name}=...; leave it out")
    return steps


_BLANK = Clip(torch.zeros(1, 3, 1, 1, 1))  # stands for what the step before will have made
