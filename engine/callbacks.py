"""What happens around the steps of a training run: exact resume, saving on SIGTERM, exporting, samples to look at."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.swa_utils import get_ema_multi_avg_fn

from reelm.data.clip import Clip
from reelm.data.writing import whole_file, write_contact_sheet, write_video

LAST = "last.ckpt"


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that stand under their name only when they are whole.

    Lightning's own are written in the system's folder for temporary files first; where that is on another disk, the
    move to their place can be cut off half-way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(path) as part:
            torch.save(checkpoint, part)


class Checkpoint(Callback):
    """Saves everything that an exact continuation needs, every so often and on SIGTERM.

    Lightning's checkpoints hold weights, optimiser, schedule, averages and the loader's position; there is no random
    state to keep (`Draws`). A save happens between optimiser steps only, and the new file replaces the old one at once.

    Args:
        folder: where `last.ckpt` is kept.
        minutes: time between saves.
        every_steps: saves by steps instead, where given.
    """

    def __init__(self, folder: str | Path, minutes: float = 5.0, every_steps: int | None = None) -> None:
        self.folder, self.minutes, self.every_steps = Path(folder), minutes, every_steps
        self.terminated = False
        self._saved_at, self._saved_step = time.monotonic(), -1
        self._previous: Any = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        if trainer.is_global_zero:
            for part in self.folder.glob(f".{Path(LAST).stem}.*.part.*"):  # of a run that was killed as it saved
                part.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()

        def stop(*_: Any) -> None:
            self.terminated = True

        try:
            self._previous = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not the main thread: somebody else looks after signals
            self._previous = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        terminated = self.terminated
        if trainer.world_size > 1:  # all ranks must agree, or one waits for the others for ever
            terminated = trainer.strategy.reduce_boolean_decision(terminated, all=False)
        step = trainer.global_step
        if self.every_steps:
            due = step % self.every_steps == 0 and step != self._saved_step
        else:
            due = time.monotonic() - self._saved_at > 60 * self.minutes
            if trainer.world_size > 1:
                due = trainer.strategy.broadcast(due)
        if due or terminated or 0 < trainer.max_steps <= step:
            trainer.save_checkpoint(self.folder / LAST)
            self._saved_at, self._saved_step = time.monotonic(), step
        if terminated:
            self.terminated = True
            saved = f"step {step} to {self.folder / LAST}"
            rank_zero_info(f"SIGTERM: saved {saved}; the same command with resume=true continues")
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever sends a SIGTERM does not wait for a validation

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def was_terminated(trainer: L.Trainer) -> bool:
    """Whether a SIGTERM ended the training early."""
    return any(isinstance(part, Checkpoint) and part.terminated for part in trainer.callbacks)


class Draws(Callback):
    """Each step draws by itself, by the run's seed, its number and its process.

    So a run that is resumed goes on as if it had not been stopped, whatever was drawn before, and no two processes
    leave out the same prompts or hide the same tokens. Each validation draws the same.
    """

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._seed = torch.initial_seed()

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed = state["seed"]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        place = (trainer.global_step, index, trainer.global_rank)  # an epoch begins where a run is made longer
        number = np.random.SeedSequence(self._seed, spawn_key=place).generate_state(1)
        L.seed_everything(int(number[0]), verbose=False)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        L.seed_everything(0, verbose=False)


class FiniteLoss(Callback):
    """Stops before the update when the loss or a gradient is not finite, and names the batch.

    Weights, optimiser and averages are then those of the step before, and so are buffers that the forward pass moves,
    such as the running means of codes and of an adversary's scores.
    """

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            self._stop(f"the loss is {loss.item()}", trainer, module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.precision == "16-mixed":  # whose scaler looks for such gradients itself, and goes on
            return
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):
            self._stop(f"the norm of the gradient is {norm.item()}", trainer, module)

    def _stop(self, what: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(self._buffers[name])
        keys = getattr(module, "batch_keys", ())
        raise FloatingPointError(
            f"{what} at step {trainer.global_step} (clips {', '.join(keys[:4])}...); "
            "the weights are those of the step before"
        )


class Export(Callback):
    """Writes the model as a folder at each validation and at the end, and samples of it as contact sheets and clips.

    Comes before weight averaging in the list of callbacks, so that what is written are the averaged weights.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            module.export(self.folder / "model", step=trainer.global_step)
            samples = module.samples()
            if samples is not None:
                clips, labels, fps = samples
                name = self.folder / "samples" / f"{trainer.global_step:07d}"
                write_contact_sheet(name.with_suffix(".png"), clips, labels=labels)
                if clips.shape[2] > 1:
                    beside = torch.cat(list(clips.float().clamp(-1, 1).cpu()), -1)
                    write_video(name.with_suffix(".mp4"), Clip(beside[None], fps=fps))
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        strip = torch.cat(list(clips[:, :, :: max(clips.shape[2] // 5, 1)].flatten(2, 3).cpu()), 2)
                        logger.experiment.add_image("samples", (strip + 1) / 2, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and not was_terminated(trainer):
            module.export(self.folder / "model", step=trainer.global_step)


class EMA(WeightAveraging):
    """Exponential moving average of the weights, which is what is validated and exported.

    Unlike Lightning's own it interpolates, so that weights which do not move stay as they are to the last bit.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} is no share of the average that stays; give 0 (no average) to below 1")
        super().__init__(use_buffers=False, multi_avg_fn=moving_average(decay))


def moving_average(decay: float) -> Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor], None]:
    """An update of averages for torch's `AveragedModel`.

    After n steps the decay is at most (1 + n) / (10 + n), so that a young run's average forgets its random beginning.
    """

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, count)

    return update


class Progress(Callback):
    """One line a while on the log, for runs without a terminal: step, speed, and what is logged."""

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self._time, self._step = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._time, self._step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        step = trainer.global_step
        if step % self.every == 0 and step != self._step and trainer.is_global_zero:
            now = time.monotonic()
            rate = (step - self._step) / max(now - self._time, 1e-9)
            self._time, self._step = now, step
            values = {k.removeprefix("train/"): float(v) for k, v in trainer.callback_metrics.items()}
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{trainer.max_steps}  {rate:.2f} steps/s  {shown}", flush=True)
