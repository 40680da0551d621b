"""Running the programs as a user does, and what most of such tests hand them."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[1]
TINY = (
    "trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=2", "data.workers=0",
    "data.validation_clips=2", "tokenizer=tiny", "quantizer.bits=12", "lm=tiny", "trainer.accelerator=cpu",
    "+trainer.enable_progress_bar=false",
)  # fmt: skip
LM = ("stage=lm", "stage.text=400")
DIFFUSION = ("stage=diffusion", "denoiser=tiny", "stage.text=400", "stage.sampling.steps=2")


def program(name: str, *arguments: str) -> int:
    """Runs scripts/<name>.py in this process; its exit status."""
    before, GlobalHydra.instance().hydra = sys.argv, None
    sys.argv = [str(ROOT / "scripts" / f"{name}.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()


def process(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    where = os.pathsep.join([str(ROOT / ".links"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def losses(output: Path) -> list[float]:
    with open(output / "logs/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row[name]) for row in rows for name in ("train/loss", "val/nll") if row.get(name)]


def error_line(capfd) -> str:
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def train_tokenizer(output: Path) -> Path:
    """A tokenizer trained for two steps by the program."""
    assert program("train", "stage=tokenizer", f"output={output}", *TINY) == 0
    return output
