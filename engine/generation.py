"""From what a user has (a prompt, pictures, clips, a mask) to clips of any length."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from reelm.data.clip import Clip
from reelm.data.controls import control_image, flow, pseudo_depth
from reelm.data.reading import probe, read_image, read_video
from reelm.data.writing import (
    PICTURES,
    VIDEOS,
    check_output,
    whole_file,
    write_contact_sheet,
    write_image,
    write_video,
)
from reelm.engine.interruption import keep_tokens, read_tokens
from reelm.engine.store import describe, fingerprint
from reelm.engine.video_lm import VideoLM, load
from reelm.engine.video_model import VideoModel
from reelm.tasks.task import Given

NEEDS = {  # what each task cannot do without
    "t2v": ("prompt",),
    "t2i": ("prompt",),
    "unconditional": (),
    "i2v": ("image",),
    "continuation": ("video",),
    "interpolation": ("image", "last"),
    "inpainting": ("video", "mask"),
    "outpainting": ("video",),
    "stylization": ("video", "prompt"),
}
ALSO = {"inpainting": ("start",), "outpainting": ("start",), "stylization": ("start",)}  # what it can be told as well


@dataclass(frozen=True)
class Inputs:
    """What a user gives: a prompt and paths.

    image, last: pictures (or clips, of which the first frame counts). video: a clip or picture of any size, rate and
    container. mask: a picture of the video's size, white where new content is to appear. keep: share of the frame that
    an outpainted clip fills. start: second of the video from which it is read.
    """

    prompt: str = ""
    image: str | None = None
    last: str | None = None
    video: str | None = None
    mask: str | None = None
    keep: float = 0.6
    start: float = 0.0

    def task(self) -> str:
        """The task that these inputs ask for, where none is named."""
        if self.image:
            return "interpolation" if self.last else "i2v"
        if self.video:
            return "inpainting" if self.mask else "continuation"
        return "t2v"

    def check(self, task: str) -> None:
        missing = [name for name in NEEDS.get(task, ()) if not getattr(self, name)]
        if missing:
            raise ValueError(f"task={task} needs {' and '.join(f'{name}=...' for name in missing)}")
        if not 0.2 <= self.keep < 1:
            raise ValueError(f"keep={self.keep}, the share of the frame that the clip fills, is from 0.2 to below 1")
        for name in ("image", "last", "video", "mask", "start"):
            if getattr(self, name) and name not in (*NEEDS.get(task, ()), *ALSO.get(task, ())):
                raise ValueError(f"task={task} has no use for {name}={getattr(self, name)}; leave it out")


def whole_length(frames: int, step: int, note: Callable[[str], None]) -> int:
    """The nearest length of `1 + step * k` frames, with a note where it is another."""
    length = max(round((frames - 1) / step), 0) * step + 1
    if length != frames:
        note(f"{frames} frames are not 1 + {step}k: making {length}")
    return length


def _clip(path: str, model: VideoModel, frames: int, start: float, size: tuple[int, int]) -> Clip:
    return read_video(path, fps=model.fps, frames=frames, size=size, start=start, short="repeat")


def _tail(path: str, model: VideoModel, most: int, size: tuple[int, int]) -> Clip:
    """The last frames of a video, `1 + step * k` of them and at most `most`."""
    seconds = probe(path).duration or 0.0
    step = model.tokenizer.compression[0]
    have = max(int(seconds * model.fps + 1e-3), 1)
    count = 1 + (min(have, most) - 1) // step * step
    return _clip(path, model, count, max(have - count, 0) / model.fps, size)


def _mask(inputs: Inputs, size: tuple[int, int]) -> Tensor:
    """`(1, 1, 1, H, W)` bool, true where the video is known, cut to size as the video is."""
    mask = read_image(inputs.mask, size=None)
    source = probe(inputs.video)
    if mask.size != source.size:
        raise ValueError(
            f"mask {inputs.mask} is {mask.size[1]} x {mask.size[0]}, the video {source.size[1]} x {source.size[0]}; "
            "make the mask as large as the video"
        )
    known = read_image(inputs.mask, size=size).video.mean(1, keepdim=True) < 0
    if known.all() or not known.any():
        raise ValueError(
            f"mask {inputs.mask} is all {'black' if known.all() else 'white'}; paint white what is to be made"
        )
    return known


def first_given(model: VideoModel, task: str, inputs: Inputs, frames: int, samples: int) -> tuple[Given, Tensor | None]:
    """What the model is told for its first window, and the pixels to keep in the result, if any."""
    inputs.check(task)
    size = model.shape[1:]
    shape = (frames, *size)
    given = Given(shape, (inputs.prompt,), fps=model.fps)
    video = known = None
    if task == "i2v":
        video = read_image(inputs.image, size=size).video
        known = torch.ones_like(video[:, :1], dtype=torch.bool)
    elif task == "interpolation":
        video = torch.zeros(1, 3, *shape)
        known = torch.zeros(1, 1, *shape, dtype=torch.bool)
        for path, frame in ((inputs.image, 0), (inputs.last, frames - 1)):
            video[:, :, frame] = read_image(path, size=size).video[:, :, 0]
            known[:, :, frame] = True
    elif task == "continuation":
        longest = max(frames - model.tokenizer.compression[0], 1)
        video = _tail(inputs.video, model, min(longest, _overlap(model)), size).video
        known = torch.ones_like(video[:, :1], dtype=torch.bool)
    elif task == "inpainting":
        video = _clip(inputs.video, model, frames, inputs.start, size).video
        known = _mask(inputs, size).expand(-1, -1, frames, -1, -1)
    elif task == "outpainting":
        inner = [max(round(side * inputs.keep), 8) for side in size]
        clip = _clip(inputs.video, model, frames, inputs.start, (inner[0], inner[1])).video
        top, left = ((side - part) // 2 for side, part in zip(size, inner))
        pads = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
        video, known = F.pad(clip, pads), F.pad(torch.ones_like(clip[:, :1], dtype=torch.bool), pads)
    elif task == "stylization":
        clip = _clip(inputs.video, model, frames, inputs.start, size).video
        given = given.replace(condition=control_image(pseudo_depth(clip), flow(clip)).expand(samples, -1, -1, -1, -1))
    if video is not None:
        video = (video * known).expand(samples, -1, -1, -1, -1)
        known = known.expand(samples, -1, -1, -1, -1)
    return given.replace(captions=(inputs.prompt,) * samples, video=video, known=known), video


def _overlap(model: VideoModel) -> int:
    """Frames of one window that the next one starts from: about a second (VideoPoet, section 5.3)."""
    step = model.tokenizer.compression[0]
    return 1 + max((model.shape[0] - 1) // (2 * step), 1) * step


def make(
    model: VideoModel,
    task: str,
    inputs: Inputs,
    frames: int | None = None,
    samples: int = 1,
    seed: int = 0,
    sampling: Any = None,
    keep_known: bool = True,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
    made: list[list[Tensor]] | None = None,
) -> Clip:
    """Clips for a user's inputs.

    frames: length of the result; beyond what the model makes at once, each further window continues the last second of
        the one before.
    keep_known: known pixels stay as they were given, instead of as the tokenizer shows them.
    made: for language models, a list that is filled with the tokens of each window, in pieces `(B, k)`; one that was
        filled by a call that was interrupted is gone on from.
    """
    windows = iter(range(10**9))

    def pixels(given: Given, task: str, seed: int) -> Tensor:
        if made is None:
            return model.generate(given, task, sampling, seed, progress).video
        number = next(windows)
        if number == len(made):
            made.append([])
        return model.generate(given, task, sampling, seed, progress, made[number]).video

    model.task(task)
    step, window = model.tokenizer.compression[0], model.shape[0]
    frames = 1 if task == "t2i" else whole_length(frames or window, step, note)
    given, video = first_given(model, task, inputs, min(frames, window), samples)
    if frames > window and task in ("inpainting", "outpainting", "interpolation", "stylization"):
        raise ValueError(f"task={task} makes clips of up to {window} frames with this model; got {frames}")
    result = pixels(given, task, seed)
    if keep_known and video is not None:
        count = video.shape[2]
        part = torch.where(given.known.to(result.device), video.to(result), result[:, :, :count])
        result = torch.cat([part, result[:, :, count:]], 2)
    while result.shape[2] < frames:
        seed += samples
        overlap = _overlap(model)
        length = min(window, overlap + frames - result.shape[2])
        tail = result[:, :, -overlap:]
        given = Given(
            (length, *model.shape[1:]),
            given.captions,
            tail,
            torch.ones_like(tail[:, :1], dtype=torch.bool),
            fps=model.fps,
        )
        further = pixels(given, "continuation" if "continuation" in model.tasks else task, seed)
        result = torch.cat([result, further[:, :, overlap:]], 2)
    return Clip(result.cpu(), model.fps, (inputs.prompt,) * samples)


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
    task = job.task or job.inputs.task()
    job.inputs.check(task)
    path, suffix = _outputs(job, task)
    model = load(job.model)
    model.task(task)
    sampling = model.sampling_with(sampling) if isinstance(sampling, Mapping) else sampling
    frames = job.frames or (round(job.seconds * model.fps) + 1 if job.seconds else None)
    settings = {  # what the result depends on, so that an interrupted job goes on with the same
        "task": task,
        "prompt": job.inputs.prompt,
        "inputs": {name: value for name, value in vars(job.inputs).items() if name != "prompt" and value is not None},
        "frames": frames,
        "seeds": list(range(job.seed, job.seed + job.samples)),
        "keep_known": job.keep_known,
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
            clip = make(
                model, task, job.inputs, frames, job.samples, job.seed, sampling, job.keep_known,
                note=lambda text: print(f"note: {text}", file=sys.stderr),
                progress=progress, made=made if isinstance(model, VideoLM) else None,
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
