"""One training run: from built parts to a model folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from reelm.engine.callbacks import LAST, Checkpoint, Export, FiniteLoss, Progress

SIGTERM_STATUS = 143


def best_precision() -> str:
    """bf16-mixed where matrix products in bfloat16 are native, otherwise 32-true."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:  # without them bfloat16 is emulated and 3 x slower
            return "bf16-mixed"
    return "32-true"


def callbacks(output: Path, ema: float, save_minutes: float, save_steps: int | None) -> list[L.Callback]:
    """What each run has; the order matters: `Export` must see the averaged weights."""
    parts: list[L.Callback] = [FiniteLoss(), Export(output), Progress(), LearningRateMonitor("step")]
    if ema:
        parts.append(EMAWeightAveraging(decay=ema, use_buffers=False))
    return [*parts, Checkpoint(output, save_minutes, save_steps)]


def loggers(output: Path) -> list[Any]:
    return [CSVLogger(output, name="logs", version=""), TensorBoardLogger(output, name="tensorboard", version="")]


def run(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, output: Path, resume: bool) -> int:
    """Fits and exports; returns the exit status (143 when a SIGTERM ended it early, as shells expect)."""
    checkpoint = output / LAST
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"resume=true but there is no {checkpoint}; name the run's folder by output=...")
    if not resume and checkpoint.is_file():
        raise FileExistsError(f"{checkpoint} exists; continue it with resume=true or choose another output=...")
    trainer.fit(module, data, ckpt_path=str(checkpoint) if resume else None, weights_only=True if resume else None)
    terminated = any(getattr(part, "terminated", False) for part in trainer.callbacks)
    if not terminated and trainer.is_global_zero:
        module.export(output / "model", step=trainer.global_step)
    return SIGTERM_STATUS if terminated else 0
