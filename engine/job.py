"""One call of the generate program: what it makes, and what it writes."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from reelm.data.writing import (
    PICTURES,
    VIDEOS,
    check_output,
    whole_file,
    write_contact_sheet,
    write_image,
    write_video,
)
from reelm.engine.chain import chain_of, make_chain
from reelm.engine.hierarchy import make_in_stages
from reelm.engine.inputs import SOUNDING, Inputs
from reelm.engine.interruption import keep_tokens, read_tokens
from reelm.engine.loading import load
from reelm.engine.store import describe, fingerprint
from reelm.engine.video_lm import VideoLM


@dataclass(frozen=True)
class Job:
    """One call of the generate program; the fields are those of conf/generate.yaml."""

    model: str
    task: str | None
    inputs: Inputs
    output: str | None = None
    seconds: float | None = None
    frames: int | None = None
    samples: int = 1
    seed: int = 0
    keep_known: bool = True
    dtype: str = "auto"
    compile: bool = False
    tokens: str | None = None
    size: tuple[int, int] | int | None = None
    fps: float | None = None
    chain: Sequence[str | Mapping[str, Any]] = ()
    actions: Sequence[int] | None = None
    stages: int = 0

    def __post_init__(self) -> None:
        for name, whole, least in (
            ("seconds", False, 0), ("frames", True, 1), ("samples", True, 1), ("seed", True, 0), ("fps", False, 0),
        ):  # fmt: skip
            if getattr(self, name) is not None or name in ("samples", "seed"):
                _check_number(name, getattr(self, name), whole, least)
        if self.frames and self.seconds:
            raise ValueError(f"frames={self.frames} and seconds={self.seconds} both say how long; leave one out")
        if self.size is not None:
            size = [self.size] * 2 if isinstance(self.size, int) else self.size
            if not isinstance(size, (list, tuple)) or [type(side) for side in size] != [int] * 2 or min(size) < 1:
                raise ValueError(f"size={self.size}; give [height,width] in pixels, or one side of a square")
            object.__setattr__(self, "size", tuple(size))

    def steps(self) -> list[tuple[str, Inputs]]:
        """The tasks to be done and their inputs, checked."""
        if self.chain and self.task:
            raise ValueError(f"task={self.task} and chain=... both say what to do; leave one out")
        if self.actions is not None and not _numbers(self.actions):
            raise ValueError(f"actions is a list of whole numbers such as [0,3,3]; got {self.actions}")
        if self.chain and self.actions is not None:
            raise ValueError("actions=... lead through one task; leave chain=... out")
        if self.stages and (self.chain or self.actions is not None):
            raise ValueError(f"stages={self.stages} makes one task in several steps; leave chain and actions out")
        if self.chain:
            return chain_of(self.chain, self.inputs)
        task = self.task or self.inputs.task()
        self.inputs.check(task)
        return [(task, self.inputs)]


def _check_number(name: str, value: Any, whole: bool, least: int) -> None:
    kinds, most = (int,) if whole else (int, float), 2**48  # with room for the seeds of parts and samples
    if type(value) in kinds and least <= value < most and (value or whole):
        return
    what = f"a whole number from {least} on, below 2^48" if whole else f"a number above {least}"
    raise ValueError(f"{name}={value}; give {what}")


def _check_memory(job: Job, frames: int, size: tuple[int, int]) -> None:
    """ValueError where not even the pixels of the result fit this machine."""
    need = 2 * 4 * 3 * job.samples * frames * size[0] * size[1]  # float32, and a copy while windows are joined
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if need > have:
        raise ValueError(
            f"frames={frames} with samples={job.samples} take {need / 1e9:.0f} GB of memory, and this machine has "
            f"{have / 1e9:.0f}; ask for fewer"
        )


def _numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int for value in values)


def _outputs(job: Job, task: str) -> tuple[Path, str]:
    """The result's path, checked before any work, and its extension."""
    suffix = ".png" if task == "t2i" else ".mp4"
    path = Path(job.output) if job.output else Path("outputs") / f"{task}{suffix}"
    allowed = PICTURES if task == "t2i" else VIDEOS
    if task in SOUNDING:
        allowed = tuple(name for name in VIDEOS if name != ".gif")  # which has no sound
    if path.suffix.lower() not in allowed:
        raise ValueError(f"output={path} ends in {path.suffix or 'nothing'}; task={task} writes {', '.join(allowed)}")
    return check_output(path, allowed), path.suffix.lower()


def _spare_inputs(written: Sequence[Path], steps: Sequence[tuple[str, Inputs]]) -> None:
    """ValueError where a file that is read would be written over."""
    results = {path.resolve() for path in written}
    for _, inputs in steps:
        for name, source in inputs.sources().items():
            if Path(source).resolve() in results:
                raise ValueError(f"the result would be written over {name}={source}; give another output=...")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def _noted() -> Iterator[None]:
    """Warnings become notes of one line, each told once."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in told:
            told.add(text)
            _note(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def run_job(job: Job, sampling: Any, config: dict) -> list[Path]:
    """Makes the clips, writes them with a JSON of what made them, and a contact sheet of several.

    sampling: how, of the model's kind; or what is to be other than the model's own way.
    """
    started = time.monotonic()
    steps = job.steps()
    task = ",".join(name for name, _ in steps)
    path, suffix = _outputs(job, steps[-1][0])
    model = load(job.model)
    for name, _ in steps:
        model.task(name)
    sampling = model.sampling_with(sampling) if isinstance(sampling, Mapping) else sampling
    frames = job.frames or (round(job.seconds * (job.fps or model.fps)) + 1 if job.seconds else None)
    form = model.fitting(frames, job.size, job.fps)
    _check_memory(job, max(frames or 1, form.frames), form.size)
    paths = [path] if job.samples == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(job.samples)]
    sheet = [] if job.samples == 1 else [path.with_suffix(".png")]
    _spare_inputs([*paths, *sheet, path.with_suffix(".json")], steps)
    if job.tokens and not isinstance(model, VideoLM):
        raise ValueError(f"tokens={job.tokens} go on with a language model's clip; this is a {model.noun}")
    settings = {  # what the result depends on, so that an interrupted job goes on with the same
        "task": task,
        "prompt": job.inputs.prompt,
        "inputs": {name: value for name, value in vars(job.inputs).items() if name != "prompt" and value is not None},
        "chain": list(job.chain),
        "frames": frames,
        "size": job.size and list(job.size),
        "fps": job.fps,
        "seeds": list(range(job.seed, job.seed + job.samples)),
        "keep_known": job.keep_known,
        "actions": job.actions and list(job.actions),
        "stages": job.stages,
        "sampling": describe(sampling),
        "tokenizer": fingerprint(model.tokenizer),
        model.noun.removeprefix("video ").replace(" ", "_"): fingerprint(model.trained),
    }
    dtype, made = read_tokens(Path(job.tokens), settings) if job.tokens else (job.dtype, [])
    dtype = model.lighten(dtype, job.compile)
    passes = 0

    def progress(count: int, total: int) -> None:
        nonlocal passes
        passes += 1
        bar.update(line, completed=count, total=total)

    loaded = time.monotonic()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True)
    line = bar.add_task(task)
    more = {"stages": job.stages} if job.stages else {"actions": job.actions}
    make = partial(make_in_stages, model, *steps[0]) if job.stages else partial(make_chain, model, steps)
    try:
        with bar, _noted():
            clip = make(
                made=made if isinstance(model, VideoLM) else None, frames=frames, samples=job.samples, **more,
                seed=job.seed, sampling=sampling, keep_known=job.keep_known, size=job.size, fps=job.fps,
                note=_note, progress=progress,
            )  # fmt: skip
        done = time.monotonic()
        for i, one in enumerate(paths):
            (write_image if suffix in PICTURES else write_video)(one, clip[i])
    except BaseException as error:  # what was made is never lost
        if any(made) or isinstance(error, KeyboardInterrupt):
            keep_tokens(path.with_suffix(".tokens.safetensors"), made, settings, dtype)
        raise
    record = {
        **settings,
        "frames": clip.frames,
        "size": list(clip.size),
        "fps": clip.fps,
        "dtype": dtype,
        "passes": passes,
        "seconds": {"load": round(loaded - started, 3), "make": round(done - loaded, 3)},
        "config": config,
    }
    with whole_file(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    paths += [write_contact_sheet(one, clip, columns=6, scale=2) for one in sheet]
    for one in paths:
        print(f"wrote {one}")
    print(f"{clip.frames} frames in {done - loaded:.1f} s (loading: {loaded - started:.1f} s)")
    return paths
