"""The models of a multirun side by side: what each costs to train, what it costs to make a clip, and how good it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.data.writing import whole_file
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import fit, store
from reelm.engine.benchmark import flops
from reelm.engine.evaluation import evaluate_task
from reelm.engine.loading import load
from reelm.engine.video_lm import VideoLM
from reelm.engine.video_model import VideoModel
from reelm.evaluation.zoetrope_judge import ATTRIBUTES

PROMPT = "a red star moves left while a blue circle bounces"


def name_of(model: VideoModel) -> str:
    """The kind of head, or of denoiser and objective."""
    if isinstance(model, VideoLM):
        return type(model.lm.visual).__name__
    return f"{type(model.diffusion.denoiser).__name__}, {type(model.diffusion.objective).__name__}"


def network_of(model: VideoModel) -> nn.Module:
    """What is passed through once for each step of making a clip."""
    return model.lm.transformer if isinstance(model, VideoLM) else model.diffusion.denoiser


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """A list that grows by one with each pass through a network."""
    passes: list[int] = []
    handle = network.register_forward_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


def training_step(model: VideoModel, clip: Clip, task: str) -> None:
    """Forward and backward over a batch, at the precision that training would choose."""
    with torch.autocast(clip.video.device.type, torch.bfloat16, enabled=fit.best_precision() == "bf16-mixed"):
        loss, _ = model.loss(clip, task)
    loss.backward()
    model.trained.zero_grad()


def costs(models: Mapping[str, VideoModel], task: str, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Processor seconds of a step of training and of a clip, in turn, on one thread; operations and passes.

    The first model is measured twice: how far its two figures are apart tells how far the others can be trusted.
    """
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    clips = {}
    for name, model in models.items():
        world = Zoetrope("train", size=model.shape[1:], frames=model.shape[0], fps=model.fps)
        clips[name] = Clip.stack([world.get(i) for i in range(batch)])
        model.trained.train().requires_grad_(True)
        results[name] = {"flops_a_clip": flops(lambda m=model, c=clips[name]: training_step(m, c, task)) / batch}
        model.trained.eval()
        with counted(network_of(model)) as passes:
            model.generate(PROMPT, task)
        results[name]["passes"] = len(passes)
    arms = [*models.items(), (next(iter(models)), next(iter(models.values())))]
    step, make = ([[] for _ in arms] for _ in range(2))
    for number in range(rounds):
        for i, (name, model) in enumerate(arms):
            started = time.thread_time()
            training_step(model, clips[name], task)
            between = time.thread_time()
            model.generate(PROMPT, task, seed=number)
            step[i].append(between - started)
            make[i].append(time.thread_time() - between)
    for i, (name, _) in enumerate(arms[:-1]):
        results[name] |= {"seconds_a_step": statistics.median(step[i]), "seconds_a_clip": statistics.median(make[i])}
    again = {"step": statistics.median(step[-1]), "clip": statistics.median(make[-1])}
    first = results[arms[0][0]]
    first["again"] = {"step": again["step"] / first["seconds_a_step"], "clip": again["clip"] / first["seconds_a_clip"]}
    return results


@dataclass(frozen=True)
class Sweep:
    """The suite `sweep`; the fields are those of conf/evaluate.yaml."""

    tasks: list[str] | None = None
    splits: Sequence[str] = ("validation", "compositional")
    clips: int = 96
    batch: int = 16
    rounds: int = 5

    def judge(self, folder: str, sheets: Path | None = None) -> dict[str, Any]:
        """Figures of the models in the numbered folders of a multirun, on one task of all of them."""
        folders = sorted(
            (path.parent for path in Path(folder).glob("*/model/config.json")), key=lambda p: str(p.parent)
        )
        if not folders:
            raise FileNotFoundError(
                f"no */model in {folder}; suite=sweep compares the models of a multirun (train.py -m)"
            )
        models = {}
        for path in folders:
            model = load(path)
            name = name_of(model)
            models[name if name not in models else f"{name}, {path.parent.name}"] = model
        task = (self.tasks or ["t2v"])[0]
        results: dict[str, Any] = {"task": task, "clips": self.clips, "batch": self.batch, "models": {}}
        measured = costs(models, task, self.batch, self.rounds)
        for (name, model), path in zip(models.items(), folders, strict=True):
            print(name, flush=True)
            scores = {}
            for split in self.splits:
                world = Zoetrope(split, size=model.shape[1:], frames=model.shape[0], fps=model.fps, short_captions=0)
                mark = name.lower().replace(", ", "_")
                sheet = None if sheets is None else sheets / f"{mark}_{split}.png"
                scores[split] = evaluate_task(model, task, world, self.clips, self.batch, sheet)
            results["models"][name] = {
                "folder": path.parent.name,
                "parameters": sum(p.numel() for p in model.trained.parameters()),
                "steps": store.read_json(path / "config.json")["notes"].get("step"),
                **measured[name],
                "scores": scores,
            }
        text = table(results)
        print(text)
        if sheets is not None:
            with whole_file(sheets / "table.md") as part:
                part.write_text(text + "\n")
        return results


def table(results: Mapping[str, Any]) -> str:
    """The results as a table in Markdown, in per cent, beside the tokenizer's ceiling, the judge and chance."""
    columns = (*ATTRIBUTES, "all")
    lines = []
    models = results["models"]
    for split in next(iter(models.values()))["scores"]:
        lines += [f"{results['task']}, {split}", ""]
        heads = [
            "head",
            "parameters",
            *columns,
            "one object",
            "GFLOP a clip trained",
            "ms a step",
            "passes",
            "s a clip",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name, one in models.items():
            scores = one["scores"][split]["generated"]
            lines.append(
                _row(name, f"{one['parameters'] / 1e6:.2f} M", scores, columns)
                + f" {one['flops_a_clip'] / 1e9:.1f} | {1e3 * one['seconds_a_step']:.0f} | {one['passes']} "
                f"| {one['seconds_a_clip']:.2f} |"
            )
        for kind in ("ceiling", "judge", "chance"):
            scores = next(iter(models.values()))["scores"][split][kind]
            lines.append(_row(f"*{kind}*", "", scores, columns) + " | | | |")
        lines.append("")
    again = next(iter(models.values()))["again"]
    lines.append(f"The first model measured twice: {again['step']:.3f} of a step, {again['clip']:.3f} of a clip.")
    return "\n".join(lines)


def _row(name: str, parameters: str, scores: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    everywhere, alone = scores["all"], scores.get("one object", {})
    cells = [f"{100 * everywhere[c]:.0f}" if c in everywhere else "" for c in columns]
    single = f"{100 * alone['all']:.0f}" if "all" in alone else ""
    return "| " + " | ".join([name, parameters, *cells, single]) + " |"
