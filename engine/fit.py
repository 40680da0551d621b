"""One training run: from built parts to a model folder."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from reelm.engine.callbacks import EMA, LAST, Checkpoint, Draws, Export, FiniteLoss, Progress, was_terminated

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


def keep_freed_memory() -> None:
    """Asks glibc to keep freed memory for the next step instead of giving it back to the system.

    Otherwise every large activation costs thousands of page faults again in each step, half of the time of a small
    model's step on a CPU. Does nothing where the C library has no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL("libc.so.6")
        for setting, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            c.mallopt(setting, value)


def callbacks(output: Path, ema: float, save_minutes: float, save_steps: int | None) -> list[L.Callback]:
    """What each run has; the order matters: `Export` must see the averaged weights."""
    parts: list[L.Callback] = [FiniteLoss(), Draws(), Export(output), Progress(), LearningRateMonitor("step")]
    if ema:
        parts.append(EMA(ema))
    return [*parts, Checkpoint(output, save_minutes, save_steps)]


def loggers(output: Path) -> list[Any]:
    """Losses as CSV and for TensorBoard. What an interrupted run has written stays, beside that of its continuation."""
    earlier = output / "logs" / "metrics.csv"
    if rank_zero_only.rank == 0 and earlier.is_file():  # the logger would delete it
        earlier.rename(earlier.with_name(f"metrics_{len(list(earlier.parent.iterdir()))}.csv"))
    return [CSVLogger(output, name="logs", version=""), TensorBoardLogger(output, name="tensorboard", version="")]


def check_checkpoint(path: Path) -> None:
    """ValueError where a file is no whole checkpoint of a training run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no error of its own for a damaged file
        raise ValueError(f"{path} is damaged or no checkpoint of this program; delete it to start anew") from error
    parts = ("state_dict", "optimizer_states", "loops")
    missing = [name for name in parts if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} is no checkpoint of this program: it has no {missing[0]}; delete it to start anew")


def check_output(output: Path, resume: bool) -> None:
    """An error where there is nothing to resume, or a run that would be overwritten."""
    checkpoint = output / LAST
    if resume and not checkpoint.is_file():
        raise FileNotFoundError(f"resume=true but there is no {checkpoint}; name the run's folder by output=...")
    if not resume and checkpoint.is_file():
        raise FileExistsError(f"{checkpoint} exists; continue it with resume=true or choose another output=...")
    if resume:
        check_checkpoint(checkpoint)


def _forget(output: Path) -> None:
    """Takes the folder of a run away that a mistake ended before its first step, if there is nothing but logs in it."""
    if output.is_dir() and {path.name for path in output.iterdir()} <= {"logs", "tensorboard"}:
        shutil.rmtree(output, ignore_errors=True)


def run(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, output: Path, resume: bool) -> int:
    """Fits and exports; returns the exit status (143 when a SIGTERM ended it early, as shells expect)."""
    checkpoint = output / LAST
    new = not output.exists()  # an older folder may hold what is somebody's
    if trainer.accelerator.__class__.__name__ == "CPUAccelerator":
        keep_freed_memory()
    try:
        trainer.fit(module, data, ckpt_path=str(checkpoint) if resume else None, weights_only=True if resume else None)
    except Exception as error:
        if new and trainer.is_global_zero and not trainer.global_step:
            _forget(output)
        if resume and isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error):
            raise ValueError(
                f"{checkpoint} is of a model of another shape; give the settings it was trained with"
            ) from error
        raise
    return SIGTERM_STATUS if was_terminated(trainer) else 0
