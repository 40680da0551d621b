"""A trainer's steps beside those of a bare loop around the same model, optimiser and batches."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from reelm.data.module import Batch, ClipData
from reelm.engine import fit
from reelm.engine.benchmark import Settings
from reelm.engine.callbacks import FiniteLoss, Progress
from reelm.engine.lm_training import LMTraining
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_lm import VideoLM
from reelm.tasks.task import Mixture, Task

STEPS = 5000  # of the training whose batches are looked at: images first, then mostly clips


class Place:
    """The part of a trainer that a `LMTraining` asks for, for use without one."""

    def __init__(self, data: ClipData) -> None:
        self.datamodule, self.max_steps = data, STEPS


class Recorded(ClipData):
    """Batches that are made already, again and again, so that loading costs nothing."""

    def __init__(self, data: ClipData, batches: list[Batch]) -> None:
        super().__init__(data.train, data.validation)
        self.batches = batches

    def train_dataloader(self) -> Recorded:
        return self

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle(self.batches)


class Beside(Callback):
    """Stops the trainer's clock after every few steps, and takes the time of other work meanwhile."""

    def __init__(self, others: dict[str, Callable[[], None]], steps: int, clock: Callable[[], float]) -> None:
        self.others, self.steps, self.clock = others, steps, clock
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *others)}
        self.started: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % self.steps:
            return
        now = self.clock()
        first = self.started is None  # these steps have made what later ones reuse
        if not first:
            self.seconds["trainer"].append(now - self.started)
        for name, work in self.others.items():
            start = self.clock()
            work()
            if not first:
                self.seconds[name].append(self.clock() - start)
        self.started = self.clock()


def training(model: VideoLM, task: Task | Mixture, tokenizer: Path, **settings: Any) -> LMTraining:
    """A training of a copy of the model's language model."""
    lm = copy.deepcopy(model.lm).float().train().requires_grad_(True)
    optimisation = Optimisation(lr=1e-4, muon=True)
    return LMTraining(tokenizer, lm.transformer, lambda **_: lm.head, task, optimisation, model.text, **settings)


def bare_steps(module: LMTraining, data: ClipData, batches: list[Batch], bf16: bool) -> Callable[[], None]:
    """The same steps as the trainer's, by hand."""
    place = Place(data)
    module.trainer = place
    module.setup("fit")
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    parameters = [p for p in module.parameters() if p.requires_grad]

    def work() -> None:
        assert place.datamodule is data  # the module holds it by a weak reference
        for batch in batches:
            batch = batch.to(module.device)
            with torch.autocast(module.device.type, torch.bfloat16, enabled=bf16):
                loss, _ = module.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()

    return work


def beside_a_bare_loop(
    model: VideoLM, data: ClipData, task: Task | Mixture, folder: Path, batches: list[Batch], settings: Settings
) -> dict[str, Any]:
    """Seconds of the trainer's steps over those of a bare loop with the same model, optimiser and batches.

    The trainer has what each run has but for averaging and saving, which a bare loop would do too.
    """
    precision, rounds = fit.best_precision(), 3 if settings.quick else settings.rounds
    clock = time.thread_time if settings.threads == 1 else time.perf_counter
    bare = {
        name: bare_steps(training(model, task, folder), data, batches, precision == "bf16-mixed")
        for name in ("bare", "bare again")
    }
    beside = Beside(bare, len(batches), clock)
    steps = len(batches) * (rounds + 1)
    with tempfile.TemporaryDirectory() as logs, contextlib.redirect_stdout(io.StringIO()):
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, precision=precision, gradient_clip_val=1.0,
            limit_val_batches=0, num_sanity_val_steps=0, log_every_n_steps=10, enable_model_summary=False,
            enable_checkpointing=False, use_distributed_sampler=False, logger=CSVLogger(logs),
            callbacks=[FiniteLoss(), Progress(), LearningRateMonitor("step"), beside],
        )  # fmt: skip
        trainer.fit(training(model, task, folder), Recorded(data, batches))

    def ratio(top: str, bottom: str) -> float:
        return statistics.median(a / b for a, b in zip(beside.seconds[top], beside.seconds[bottom], strict=True))

    return {
        "precision": precision,
        "steps_a_round": len(batches),
        "seconds_a_step": {n: statistics.median(s) / len(batches) for n, s in beside.seconds.items()},
        "trainer_over_bare": ratio("trainer", "bare"),
        "same_twice": ratio("bare again", "bare"),
    }
