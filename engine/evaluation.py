"""What a model makes of each task on Zoetrope, attribute by attribute, beside the judge's own error, chance and the
ceiling that the tokenizer sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.data.module import Group, in_turn
from reelm.data.writing import write_contact_sheet
from reelm.data.zoetrope.captions import Attributes
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.hearing import Ear
from reelm.engine.loading import load
from reelm.engine.video_model import VideoModel
from reelm.engine.zoetrope_scoring import asked, changes, closes, even, sensible
from reelm.evaluation.reconstruction import code_usage, psnr
from reelm.evaluation.zoetrope_hearing import ATTRIBUTES as AUDIBLE
from reelm.evaluation.zoetrope_judge import ATTRIBUTES, Tally
from reelm.evaluation.zoetrope_reading import Reading, read
from reelm.tasks.known_frames import Loop


def batches(world: Zoetrope, model: VideoModel, name: str, count: int, size: int) -> Iterable[tuple[list[int], Clip]]:
    """The first `count` clips for a task, in batches of similar caption length, with their numbers."""
    task = model.task(name)
    group = Group(name, 1.0, task.frames, task.controls, getattr(task, "audio", False))
    for requests in in_turn(world, [group], min(size, count), count, length=model.packer.text_length):
        indices = [request.index for request in requests]
        yield indices, Clip.stack([world.get(i, **group.options()) for i in indices])


@torch.inference_mode()
def evaluate_task(
    model: VideoModel, name: str, world: Zoetrope, clips: int, batch: int, sheet: Path | None = None
) -> dict[str, Any]:
    """Scores of one task: what was generated, the true clips (the judge's own error), what was generated under the next
    clip's caption (chance), the tokenizer's reconstructions (ceiling)."""
    made, true, chance, ceiling = Tally(), Tally(), Tally(), Tally()
    readings: dict[int, tuple[Reading, Attributes]] = {}
    loops: dict[str, list[Tensor]] = {"generated": [], "ceiling": [], "judge": []}
    ends: dict[str, list[Tensor]] = {"generated": [], "ceiling": []}
    quality, shown = [], []
    task, ear = model.task(name), Ear(model, world)
    started = time.monotonic()
    for number, (indices, clip) in enumerate(batches(world, model, name, clips, batch)):
        given, target = task.split(clip, torch.Generator().manual_seed(number))
        result = model.generate(given, name, seed=1000 * number)
        if "audio" in given.asks:
            ear.add(indices, given, target, result)
        if "video" not in given.asks:
            continue
        reconstruction = model.tokenizer.decode(model.tokenizer.encode(target.video))
        quality.append(psnr(reconstruction, target.video))
        if given.known is not None and given.known.shape[2] == given.shape[0] and given.known[:, :, -1].all():
            for kind, video in zip(ends, (result.video, reconstruction), strict=True):
                ends[kind].append(psnr(video[:, :, -1:], target.video[:, :, -1:]))
        if isinstance(task, Loop):  # the last frame is the first of the next time
            for kind, video in zip(loops, (result.video, reconstruction, target.video), strict=True):
                loops[kind].append(changes(video[:, :, :-1]))
        for i, index in enumerate(indices):
            reading, want = readings[index] = read(result.video[i]), asked(task, clip.captions[i])
            if name != "unconditional":
                made.add(reading, want)
            true.add(read(target.video[i]), want)
            ceiling.add(read(reconstruction[i]), want)
            if index < 12:
                shown.append((result.video[i], clip.captions[i] if name != "unconditional" else ""))
    total = len(readings)
    for index, (reading, _) in readings.items():
        chance.add(reading, readings[(index + 1) % total][1])
    if sheet is not None and ear.heard:
        ear.sheet(sheet.with_stem(f"{sheet.stem}_sound"))
    if sheet is not None and shown:
        videos = torch.stack([video for video, _ in shown])
        write_contact_sheet(sheet, videos, columns=min(6, videos.shape[2]), labels=[text for _, text in shown], scale=2)
    scores: dict[str, Any] = {"heard": ear.scores()} if ear.heard else {}
    for measure in (closes, even) if loops["judge"] else ():
        shares = {
            kind: float(torch.cat([measure(loop) for loop in found]).float().mean()) for kind, found in loops.items()
        }
        scores[measure.__name__] = {kind: round(share, 4) for kind, share in shares.items()}
    if ends["ceiling"]:
        scores["last_frame_psnr"] = {kind: round(float(torch.cat(found).median()), 2) for kind, found in ends.items()}
    return {
        **scores,
        "clips": total or len(ear.heard),
        "generated": made.shares(),
        "ceiling": ceiling.shares(),
        "judge": true.shares(),
        "chance": chance.shares(),
        "sensible": round(sum(sensible(reading) for reading, _ in readings.values()) / max(total, 1), 4),
        "reconstruction_psnr": round(float(torch.cat(quality).mean()), 2) if quality else None,
        "seconds_a_clip": round((time.monotonic() - started) / max(total, len(ear.heard)), 2),
    }


def table(split: str, results: dict[str, Any]) -> str:
    """The scores as text: a row for each task and kind, a column for each attribute, in per cent."""
    seen = {task: result for task, result in results.items() if result["generated"] or result["chance"]}
    heard = {task: result["heard"] for task, result in results.items() if "heard" in result}
    parts = [_table(split, seen, ATTRIBUTES)] * bool(seen) + [_table(split, heard, AUDIBLE)] * bool(heard)
    return "\n".join(parts)


def _table(split: str, results: dict[str, Any], attributes: Sequence[str]) -> str:
    columns = [*attributes, "all"]
    lines = [f"{split:<20}{'':<12}{'scenes':<12}" + "".join(f"{name[:10]:>11}" for name in columns)]
    for task, result in results.items():
        for kind in ("generated", "ceiling", "judge", "chance"):
            for scenes, shares in result[kind].items():
                if scenes == "all" or kind in ("generated", "ceiling"):
                    cells = "".join(f"{100 * shares[c]:>11.1f}" if c in shares else f"{'':>11}" for c in columns)
                    lines.append(f"{task:<20}{kind:<12}{scenes:<12}{cells}")
        if task == "unconditional":
            lines.append(f"{task:<20}{'sensible':<12}{'all':<12}{100 * result['sensible']:>11.1f}")
        for measure in ("closes", "even"):
            for kind, share in result.get(measure, {}).items():
                lines.append(f"{task:<20}{measure:<12}{kind:<12}{100 * share:>11.1f}")
        for kind, decibels in result.get("last_frame_psnr", {}).items():
            lines.append(f"{task:<20}{'last frame':<12}{kind:<12}{decibels:>11.1f} dB")
    return "\n".join(lines)


def evaluate(
    model: VideoModel,
    tasks: list[str] | None = None,
    splits: tuple[str, ...] = ("validation", "compositional"),
    clips: int = 96,
    batch: int = 16,
    sheets: Path | None = None,
    show: Callable[[str], None] = print,
    formats: bool = False,
) -> dict[str, Any]:
    """The suite: every task on every split, with full captions.

    sheets: folder of the contact sheets. formats: in each of the model's formats, not only the usual one.
    """
    for setting, value in (("clips", clips), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{setting}={value} must be 1 or more")
    results: dict[str, Any] = {}
    ways = model.formats.parts if formats and model.formats is not None else (model.fitting(),)
    for split in splits:
        results[split] = {}
        for form in ways:
            world = Zoetrope(split, size=form.size, frames=form.frames, fps=form.fps, short_captions=0)
            mark = "" if form == ways[0] else f"_{form.frames}x{form.size[0]}x{form.size[1]}"
            mark += "" if form.fps == ways[0].fps else f"_{form.fps:g}fps"
            for name in tasks or list(model.tasks):
                sheet = None if sheets is None else sheets / f"{name}_{split}{mark}.png"
                result = results[split][name + mark] = evaluate_task(model, name, world, clips, batch, sheet)
                show(table(split, {name + mark: result}))
    return results


def judge_tokenizer(model: VideoModel, clips: int = 128) -> dict[str, float]:
    """Reconstruction PSNR of the tokenizer on Zoetrope validation and, where it has codes, how they are used and the
    share of the rarer value of the least used bit of their numbers."""
    tokenizer = model.tokenizer
    world = Zoetrope("validation", size=model.shape[1:], frames=model.shape[0], fps=model.fps)
    ids: list[Tensor] = []
    quality: list[Tensor] = []
    for start in range(0, clips, 8):
        video = Clip.stack([world.get(i) for i in range(start, start + 8)]).video
        ids.append(tokenizer.encode(video))
        quality.append(psnr(tokenizer.decode(ids[-1]), video))
    reconstruction = {"psnr": float(torch.cat(quality).mean())}
    if tokenizer.vocabulary is None:
        return reconstruction
    flat = torch.cat(ids).flatten()
    bits = max((tokenizer.vocabulary - 1).bit_length(), 1)
    ones = [float(((flat >> bit) & 1).float().mean()) for bit in range(bits)]
    usage = code_usage(flat, tokenizer.vocabulary)
    return {
        **reconstruction,
        "codes_used": usage["codes_used"],
        "perplexity": usage["perplexity"],
        "least_used_bit": min(min(one, 1 - one) for one in ones),
    }


@dataclass(frozen=True)
class Zoetropes:
    """The suite `zoetrope`; the fields are those of conf/evaluate.yaml."""

    tasks: list[str] | None = None
    splits: Sequence[str] = ("validation", "compositional")
    clips: int = 96
    batch: int = 16
    formats: bool = False

    def judge(self, folder: str, sheets: Path | None = None) -> dict[str, Any]:
        """Figures of a model of the box, or of a folder: its tokenizer's, then each task's on each split."""
        for setting in ("tasks", "splits"):
            value = getattr(self, setting)
            if value is not None and not isinstance(value, (list, tuple)):
                raise ValueError(f"{setting}={value} is no list; write {setting}=[{value}]")
        for setting in ("clips", "batch"):
            value = getattr(self, setting)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{setting}={value}; give a whole number from 1 on")
        for split in self.splits:
            Zoetrope(split)
        model = load(folder)
        for task in self.tasks or ():
            model.task(task)
        quality = judge_tokenizer(model)
        print("tokenizer", {name: round(value, 4) for name, value in quality.items()})
        return {
            "tokenizer": quality,
            **evaluate(model, self.tasks, tuple(self.splits), self.clips, self.batch, sheets, formats=self.formats),
        }
