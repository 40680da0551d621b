"""What survives a fault in training: the weights where a number is none, the checkpoint where the process is killed."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from reelm.data.module import ClipData
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import fit
from reelm.engine.callbacks import EMA, LAST, Checkpoint, FiniteLoss
from reelm.engine.optimisation import Optimisation
from reelm.engine.tokenizer_training import TokenizerTraining
from reelm.tokenizers import discriminator, quantizers
from reelm.tokenizers.discriminator import Adversary, Discriminator
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ, VQ

NAN = float("nan")
SMALL = 2.0**-14  # so that a network whose weights all are a few hundred of it can be trained on


def module(quantizer: torch.nn.Module | None = None) -> TokenizerTraining:
    tokenizer = MAGVIT2(
        quantizer or LFQ(6, 0.5), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1),
        kernels=((1, 3, 3), (3, 3, 3)),
    )  # fmt: skip
    adversary = Adversary(Discriminator((8, 8), ((2, 2, 2),)), every=2)
    return TokenizerTraining(tokenizer, Optimisation(warmup=1), adversary=adversary)


def trained(training: TokenizerTraining, output: Path, steps: int, *more: Callback, resume: bool = False) -> L.Trainer:
    sources = {split: Zoetrope(split, size=16, frames=5, length=20) for split in ("train", "validation")}
    data = ClipData(**sources, batch_size=2, workers=0, validation_clips=2)
    callbacks = [*more, FiniteLoss(), EMA(0.9), Checkpoint(output, minutes=1000)]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, gradient_clip_val=1.0,
        num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    fit.check_output(output, resume)
    assert fit.run(trainer, training, data, output, resume) == 0
    return trainer


def state(trainer: L.Trainer) -> dict[str, Any]:
    """Copies of all that a step moves, by name."""
    average = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))._average_model
    parts = {"model": trainer.lightning_module.state_dict(), "average": average.state_dict()}
    parts |= {f"optimiser {i}": entry for i, entry in trainer.optimizers[0].state_dict()["state"].items()}
    return {f"{part}/{key}": value.clone() for part, values in parts.items() for key, value in values.items()}


class Poison(Callback):
    """Makes something NaN before the third step, and keeps the state from before it."""

    def __init__(self, inject: Callable[[TokenizerTraining], None]) -> None:
        self.inject, self.before, self.keys = inject, {}, ()

    def setup(self, trainer, training, stage) -> None:
        self.trainer = trainer

    def on_train_batch_start(self, trainer, training, batch, index) -> None:
        if trainer.global_step == 2:
            self.before, self.keys = state(trainer), batch.clip.keys
            self.inject(training)


def nothing(result: Any) -> Any:
    """NaN of the same shapes, that keep their graph."""
    return tuple(map(nothing, result)) if isinstance(result, tuple) else result * NAN


def faults(patch: pytest.MonkeyPatch) -> dict[str, Callable[[TokenizerTraining], None]]:
    def spoil(place: Any, name: str) -> None:
        whole = getattr(place, name)
        patch.setattr(place, name, lambda *arguments, **named: nothing(whole(*arguments, **named)))

    def slope(training: TokenizerTraining) -> None:
        training.tokenizer.decoder.last.bias.register_hook(lambda grad: grad * NAN)

    return {
        "generator": lambda training: spoil(training.tokenizer, "decode_latents"),
        "encoder": lambda training: spoil(training.tokenizer, "encode_latents"),
        "discriminator": lambda training: spoil(discriminator, "discriminator_loss"),
        "entropy": lambda training: spoil(quantizers, "lfq_entropy"),
        "gradient": slope,
    }


class Fail(Callback):
    """Writes as a logger does, and something else if it is told so, and fails before a step."""

    def __init__(self, output: Path, step: int, other: str | None = None) -> None:
        self.output, self.step, self.other = output, step, other

    def on_train_batch_start(self, trainer, training, batch, index) -> None:
        for name in ("logs", "tensorboard", *([self.other] if self.other else [])):
            (self.output / name).mkdir(parents=True, exist_ok=True)
        if trainer.global_step == self.step:
            raise ValueError("a mistake")


@pytest.mark.parametrize(
    ("step", "other", "before", "left"),
    [
        (0, None, False, False), (1, None, False, True), (0, "samples", False, True), (0, "model", False, True),
        (0, None, True, True),
    ],
)  # fmt: skip
def test_only_logs_of_no_step_are_taken_away(step, other, before, left, tmp_path):
    output = tmp_path / "run"
    if before:
        output.mkdir()
    with pytest.raises(ValueError, match="a mistake"):
        trained(module(), output, 3, Fail(output, step, other))
    assert output.exists() == left and (not left or (output / "logs").is_dir())


@pytest.mark.parametrize(
    ("fault", "quantizer"),
    [
        ("generator", None), ("discriminator", None), ("entropy", None), ("gradient", None),
        ("encoder", lambda: VQ(16, 4)),  # whose codes are moved by the forward pass
    ],
)  # fmt: skip
def test_what_is_no_number_moves_nothing_and_names_the_batch(fault, quantizer, tmp_path, monkeypatch):
    training = module(quantizer and quantizer())
    poison = Poison(faults(monkeypatch)[fault])
    with pytest.raises(FloatingPointError, match="is nan at step 2") as caught:
        trained(training, tmp_path, 5, poison)
    assert "\n" not in str(caught.value) and all(key in str(caught.value) for key in poison.keys)
    assert ("the norm of the gradient" in str(caught.value)) == (fault == "gradient")
    after = state(poison.trainer)
    assert poison.before.keys() == after.keys() and any(name.startswith("optimiser") for name in after)
    assert any("real_mean" in name for name in after)
    for name, value in poison.before.items():
        assert torch.equal(value, after[name]), name
    assert not list(tmp_path.iterdir())


def saving_and_killed(save: Callable[[int], None], first: int, after: float) -> None:
    """Saves again and again, numbered from `first`, in a process that is killed so many seconds after it began to."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(tell, b"x")
            while True:
                save(first)
                first += 1
        finally:
            os._exit(1)
    os.read(told, 1)
    os.close(told)
    os.close(tell)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the saving itself failed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_never_leaves_less_than_a_whole_checkpoint(kills, tmp_path):
    training = module()
    trainer = trained(training, tmp_path, 1)
    path, weights = tmp_path / LAST, list(training.parameters())

    def save(number: int) -> None:
        with torch.no_grad():
            for weight in weights:
                weight.fill_(number * SMALL)
        trainer.save_checkpoint(path)

    def found() -> int:
        """The number of the save that the file is of, wholly."""
        fit.check_checkpoint(path)
        stored = torch.load(path, weights_only=True)["current_model_state"]
        numbers = {
            float(x) for name, _ in training.named_parameters() for x in (stored[name].min(), stored[name].max())
        }
        assert len(numbers) == 1
        return round(numbers.pop() / SMALL)

    draw, last, cut_off = random.Random(0), 1, 0
    save(last)
    started = time.monotonic()
    save(last)
    lasts = time.monotonic() - started
    for _ in range(kills):
        saving_and_killed(save, last + 1, draw.uniform(0, 3 * lasts))
        number = found()
        assert number >= last  # the one before or a newer one, never none
        last = number
        parts = list(tmp_path.glob(".last.*"))
        cut_off += len(parts)
        for part in parts:
            part.unlink()
    assert kills < 100 or (cut_off > 0 and last > 1)
    (tmp_path / ".last.77.part.ckpt").write_bytes(b"half")
    assert trained(module(), tmp_path, 2, resume=True).global_step == 2 and not list(tmp_path.glob(".*"))
