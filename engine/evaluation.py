"""What a model makes of each task on Zoetrope, attribute by attribute, beside the judge's own error, chance and the
ceiling that the tokenizer sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.data.module import Group, GroupedBatches
from reelm.data.writing import write_contact_sheet
from reelm.data.zoetrope.captions import parse
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.tokenizer_training import psnr
from reelm.engine.video_lm import VideoLM
from reelm.evaluation.zoetrope_judge import ATTRIBUTES, Reading, read, score

Scores = dict[str, dict[str, float]]


class Tally:
    """Counts of right answers by attribute, over all scenes and over those of one object."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = {}

    def add(self, reading: Reading, asked: Any) -> None:
        for name, (right, total) in score(reading, asked).items():
            for scenes in ("all", "one object") if len(asked.objects) == 1 else ("all",):
                for attribute in (name, "all"):
                    count = self.counts.setdefault((scenes, attribute), [0, 0])
                    count[0] += right
                    count[1] += total

    def shares(self) -> Scores:
        """`{"all": {attribute: share}, "one object": {...}}`."""
        result: Scores = {}
        for (scenes, attribute), (right, total) in self.counts.items():
            result.setdefault(scenes, {})[attribute] = round(right / total, 4)
        return result


def batches(world: Zoetrope, model: VideoLM, name: str, count: int, size: int) -> Iterable[Clip]:
    """`count` clips for a task, in batches of similar caption length."""
    task = model.task(name)
    group = Group(name, frames=task.frames, controls=task.controls)
    order = GroupedBatches(world, [group], size, -(-count // size), seed=7, length=model.packer.text_length)
    for requests in order:
        yield Clip.stack([world.get(r.index, frames=task.frames, controls=task.controls) for r in requests])


def sensible(reading: Reading) -> bool:
    """Whether a clip made from nothing shows a world that could be: one to three objects of different colours."""
    colours = [thing.colour for thing in reading.objects]
    return 1 <= len(colours) <= 3 and len(set(colours)) == len(colours)


@torch.inference_mode()
def evaluate_task(
    model: VideoLM, name: str, world: Zoetrope, clips: int, batch: int, sheet: Path | None = None
) -> dict[str, Any]:
    """Scores of one task: what was generated, the true clips (the judge's own error), other clips' captions (chance),
    the tokenizer's reconstructions (ceiling)."""
    made, true, chance, ceiling = Tally(), Tally(), Tally(), Tally()
    valid = total = 0
    quality, shown = [], []
    task = model.task(name)
    started = time.monotonic()
    for number, clip in enumerate(batches(world, model, name, clips, batch)):
        given, target = task.split(clip, torch.Generator().manual_seed(number))
        result = model.generate(given, name, seed=1000 * number)
        reconstruction = model.tokenizer.decode(model.tokenizer.encode(target.video))
        quality.append(psnr(reconstruction, target.video))
        asked = [parse(caption) for caption in clip.captions]
        for i, want in enumerate(asked):
            reading = read(result.video[i])
            valid, total = valid + sensible(reading), total + 1
            if name != "unconditional":
                made.add(reading, want)
            true.add(read(target.video[i]), want)
            ceiling.add(read(reconstruction[i]), want)
            chance.add(reading, asked[(i + 1) % len(asked)])
        if len(shown) < 12:
            shown += [(result.video[i], clip.captions[i]) for i in range(min(len(clip), 12 - len(shown)))]
    if sheet is not None:
        videos = torch.stack([video for video, _ in shown])
        write_contact_sheet(sheet, videos, columns=min(6, videos.shape[2]), labels=[text for _, text in shown], scale=2)
    return {
        "clips": total,
        "generated": made.shares(),
        "ceiling": ceiling.shares(),
        "judge": true.shares(),
        "chance": chance.shares(),
        "sensible": round(valid / total, 4),
        "reconstruction_psnr": round(float(torch.cat(quality).mean()), 2),
        "seconds_a_clip": round((time.monotonic() - started) / total, 2),
    }


def table(split: str, results: dict[str, Any]) -> str:
    """The scores as text: a row for each task and kind, a column for each attribute, in per cent."""
    columns = [*ATTRIBUTES, "all"]
    lines = [f"{split:<16}{'':<12}{'scenes':<12}" + "".join(f"{name:>11}" for name in columns)]
    for task, result in results.items():
        for kind in ("generated", "ceiling", "judge", "chance"):
            for scenes, shares in result[kind].items():
                if scenes == "all" or kind in ("generated", "ceiling"):
                    cells = "".join(f"{100 * shares[c]:>11.1f}" if c in shares else f"{'':>11}" for c in columns)
                    lines.append(f"{task:<16}{kind:<12}{scenes:<12}{cells}")
        if task == "unconditional":
            lines.append(f"{task:<16}{'sensible':<12}{'all':<12}{100 * result['sensible']:>11.1f}")
    return "\n".join(lines)


def evaluate(
    model: VideoLM,
    tasks: list[str] | None = None,
    splits: tuple[str, ...] = ("validation", "compositional"),
    clips: int = 96,
    batch: int = 16,
    sheets: Path | None = None,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The suite: every task on every split, with full captions. `sheets`: folder of the contact sheets."""
    results: dict[str, Any] = {}
    for split in splits:
        world = Zoetrope(split, size=model.shape[1:], frames=model.shape[0], fps=model.fps, short_captions=0)
        results[split] = {}
        for name in tasks or list(model.tasks):
            sheet = None if sheets is None else sheets / f"{name}_{split}.png"
            results[split][name] = evaluate_task(model, name, world, clips, batch, sheet)
            show(table(split, {name: results[split][name]}))
    return results


def judge_tokenizer(tokenizer: torch.nn.Module, clips: int = 128, size: int = 64) -> dict[str, float]:
    """Reconstruction PSNR on Zoetrope validation, codes used and the share of ones of each bit of their numbers."""
    world = Zoetrope("validation", size=size)
    ids: list[Tensor] = []
    quality: list[Tensor] = []
    for start in range(0, clips, 8):
        video = Clip.stack([world.get(i) for i in range(start, start + 8)]).video
        ids.append(tokenizer.encode(video))
        quality.append(psnr(tokenizer.decode(ids[-1]), video))
    flat = torch.cat(ids).flatten()
    bits = max((tokenizer.vocabulary - 1).bit_length(), 1)
    ones = [float(((flat >> bit) & 1).float().mean()) for bit in range(bits)]
    counts = torch.bincount(flat, minlength=tokenizer.vocabulary).float()
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(torch.cat(quality).mean()),
        "codes_used": int((counts > 0).sum()),
        "perplexity": float((-(share * share.log()).sum()).exp()),
        "least_used_bit": min(min(one, 1 - one) for one in ones),
    }
