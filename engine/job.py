"""One call of the generate program: what it makes, and what it writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
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
from reelm.engine.inputs import Inputs
from reelm.engine.interruption import keep_tokens, read_tokens
from reelm.engine.store import describe, fingerprint
from reelm.engine.video_lm import VideoLM, load


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
    tokens: str | None = None
    size: tuple[int, int] | None = None
    fps: float | None = None
    chain: Sequence[str | Mapping[str, Any]] = ()
    actions: Sequence[int] | None = None
    stages: int = 0

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


def _numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int for value in values)


def _outputs(job: Job, task: str) -> tuple[Path, str]:
    """The result's path, checked before any work, and its extension."""
    suffix = ".png" if task == "t2i" else ".mp4"
    path = Path(job.output) if job.output else Path("outputs") / f"{task}{suffix}"
    allowed = PICTURES if task == "t2i" else VIDEOS
    if path.suffix.lower() not in allowed:
        raise ValueError(f"output={path} ends in {path.suffix or 'nothing'}; task={task} writes {', '.join(allowed)}")
    return check_output(path, allowed), path.suffix.lower()


def run_job(job: Job, sampling: Any, config: dict) -> list[Path]:
    """Makes the clips, writes them with a JSON of what made them, and a contact sheet of several.

    sampling: how, of the model's kind; or what is to be other than the model's own way.
    """
    if job.samples < 1:
        raise ValueError(f"samples={job.samples}; give 1 or more")
    started = time.monotonic()
    steps = job.steps()
    task = ",".join(name for name, _ in steps)
    path, suffix = _outputs(job, steps[-1][0])
    model = load(job.model)
    for name, _ in steps:
        model.task(name)
    sampling = model.sampling_with(sampling) if isinstance(sampling, Mapping) else sampling
    frames = job.frames or (round(job.seconds * (job.fps or model.fps)) + 1 if job.seconds else None)
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
    dtype = model.lighten(dtype)
    passes = 0

    def progress(count: int, total: int) -> None:
        nonlocal passes
        passes += 1
        bar.update(line, completed=count, total=total)

    loaded = time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), transient=True) as bar:
        line = bar.add_task(task)
        try:
            more = {"stages": job.stages} if job.stages else {"actions": job.actions}
            clip = (partial(make_in_stages, model, *steps[0]) if job.stages else partial(make_chain, model, steps))(
                made=made if isinstance(model, VideoLM) else None, frames=frames, samples=job.samples, **more,
                seed=job.seed, sampling=sampling, keep_known=job.keep_known, size=job.size, fps=job.fps,
                note=lambda text: print(f"note: {text}", file=sys.stderr), progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            bar.stop()
            keep_tokens(path.with_suffix(".tokens.safetensors"), made, settings, dtype)
            raise
    done = time.monotonic()
    paths = [path] if job.samples == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(job.samples)]
    for i, one in enumerate(paths):
        (write_image if suffix in PICTURES else write_video)(one, clip[i])
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
    if job.samples > 1:
        paths.append(write_contact_sheet(path.with_suffix(".png"), clip, columns=6, scale=2))
    for one in paths:
        print(f"wrote {one}")
    print(f"{clip.frames} frames in {done - loaded:.1f} s (loading: {loaded - started:.1f} s)")
    return paths
