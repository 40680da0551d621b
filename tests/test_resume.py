"""An interrupted training goes on exactly as if it had never been interrupted."""

import multiprocessing
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel

from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import fit, store
from reelm.engine.callbacks import LAST, moving_average
from reelm.engine.encoding import Encoding, encode

STEPS = 6
SETTINGS = (
    f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS // 2}", "data.batch_size=2", "data.workers=0",
    "data.validation_clips=2", "tokenizer=tiny", "quantizer.bits=12", "lm=tiny", "stage.text=400",
    "trainer.accelerator=cpu", "trainer.precision=32-true", "ema=0.9", "+data.train.length=100", "save_minutes=1000",
    "+trainer.enable_progress_bar=false",
    "stage.optimisation.warmup=2",
)  # fmt: skip


ADVERSARY = (
    "adversary=magvit2", "adversary.discriminator.channels=[8,8]", "adversary.discriminator.strides=[[2,2,2]]",
    "adversary.every=2",
)  # fmt: skip


class Watch(Callback):
    """Notes what each step trained on and which random number follows it; asks for the end as a cluster does."""

    def __init__(self, end_after: int | None = None, end_all: bool = False) -> None:
        self.end_after, self.end_all, self.seen = end_after, end_all, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.seen.append((trainer.global_step, batch.name, batch.clip.keys, float(outputs["loss"])))
        if self.end_all and trainer.global_step == self.end_after - 1:
            for loader in multiprocessing.active_children():
                os.kill(loader.pid, signal.SIGTERM)
                loader.join(0.5)
                assert loader.is_alive()
        if trainer.global_step == self.end_after:
            os.kill(os.getpid(), signal.SIGTERM)


def train(output: Path, *overrides: str, resume: bool = False, **end: int | bool) -> tuple[int, list]:
    """What scripts/train.py does, with an eye on it: exit status and the steps."""
    GlobalHydra.instance().clear()
    settings = [s for s in SETTINGS if "stage=lm" in overrides or not s.startswith("stage.text")]
    if "data=tokens" in overrides:
        settings.remove("+data.train.length=100")
    with initialize_config_module("reelm.conf", version_base=None):
        cfg = compose("train", [*settings, f"output={output}", *overrides])
    fit.check_output(output, resume)
    L.seed_everything(1000 if resume else cfg.seed, verbose=False)  # a resumed run must not lean on its seed
    watch = Watch(**end)
    data, module = instantiate(cfg.data), instantiate(cfg.stage)
    callbacks = [watch, *fit.callbacks(output, cfg.ema, cfg.save_minutes, cfg.save_steps)]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=fit.loggers(output), default_root_dir=str(output))
    return fit.run(trainer, module, data, output, resume), watch.seen


def same(a, b, where: str = "") -> None:
    """Bit-equal, however deep."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer")
    assert train(output, "stage=tokenizer")[0] == 0
    return output / "model"


def test_a_signal_to_the_loaders_too_ends_in_a_checkpoint(tmp_path):
    status, steps = train(tmp_path, "stage=tokenizer", "data.workers=1", end_after=2, end_all=True)
    assert status == fit.SIGTERM_STATUS and [step for step, *_ in steps] == [1, 2]
    assert (tmp_path / LAST).is_file() and not multiprocessing.active_children()


@pytest.mark.parametrize(
    "stage, workers, more",
    [
        ("tokenizer", 0, ()),
        pytest.param("tokenizer", 1, (), marks=pytest.mark.slow),
        ("tokenizer", 0, ADVERSARY),
        ("lm", 0, ()),
        pytest.param("lm", 1, (), marks=pytest.mark.slow),
        ("lm", 0, ("data=tokens",)),
    ],
)
def test_resume_is_exact(stage, workers, more, tokenizer, tmp_path):
    overrides = [f"stage={stage}", f"data.workers={workers}", *more]
    if stage == "lm":
        overrides += [f"stage.tokenizer={tokenizer}", "task=mixture"]
    if "data=tokens" in more:
        sources = {split: Zoetrope(split, length=40) for split in ("train", "validation")}
        model = store.load(tokenizer)
        encode([Encoding(source, model, tmp_path / split, {}, 8) for split, source in sources.items()], workers=0)
        pixels = "backward interpolation connection loop inpainting outpainting stylization".split()
        overrides += [f"data.root={tmp_path}", *(f"task.weights.{name}=0" for name in pixels)]
    status, straight = train(tmp_path / "straight", *overrides)
    assert status == 0 and [step for step, *_ in straight] == list(range(1, STEPS + 1))

    status, first = train(tmp_path / "parts", *overrides, end_after=STEPS // 2)
    assert status == fit.SIGTERM_STATUS and len(first) == STEPS // 2 and not (tmp_path / "parts/model").exists()
    status, second = train(tmp_path / "parts", *overrides, resume=True)
    assert status == 0 and first + second == straight  # the same clips and the same losses, to the last bit

    one, other = (torch.load(tmp_path / run / LAST, weights_only=True) for run in ("straight", "parts"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "averaging_state", "current_model_state"):
        assert (part in one) == (part in other)
        if part in one:
            same(one[part], other[part], part)
    weights = [(tmp_path / run / "model").rglob("model.safetensors") for run in ("straight", "parts")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*map(sorted, weights), strict=True))


def test_foreign_checkpoints_are_refused(tmp_path):
    checkpoint = tmp_path / LAST
    for content in (b"", b"not a checkpoint" * 100):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no checkpoint"):
            fit.check_checkpoint(checkpoint)
    torch.save({"state_dict": {}}, checkpoint)
    with pytest.raises(ValueError, match="it has no optimizer_states"):
        fit.check_checkpoint(checkpoint)
    torch.save({"state_dict": Path("x")}, checkpoint)  # an object whose loading could run code
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        fit.check_checkpoint(checkpoint)


def test_a_cut_off_or_other_models_checkpoint_is_refused(tokenizer, tmp_path):
    whole = (tokenizer.parent / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        train(tmp_path, "stage=tokenizer", resume=True)
    (tmp_path / LAST).write_bytes(whole)
    with pytest.raises(ValueError, match="of a model of another shape"):
        train(tmp_path, "stage=tokenizer", "tokenizer.channels=[16,24]", resume=True)


def test_resume_needs_something_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume=true but there is no"):
        train(tmp_path, "stage=tokenizer", resume=True)


def test_averages_forget_the_beginning_and_keep_what_does_not_move():
    net = torch.nn.Linear(4, 4)
    average = AveragedModel(net, multi_avg_fn=moving_average(0.99))
    fixed = net.bias.detach().clone()
    for step in range(2000):
        with torch.no_grad():
            net.weight.fill_(min(step, 50))
        average.update_parameters(net)
        if step == 100:
            assert average.module.weight.min() > 49  # with a decay of 0.99 from the first step on it would be at 27
    assert torch.equal(average.module.bias, fixed)
    assert average.module.weight.min() > 49.99
