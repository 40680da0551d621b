"""Training of the audio tokenizer: its terms, its alarm, its adversary, and a run from the command line."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.module import Batch, ClipData
from reelm.data.tokens import TokenShards
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import store
from reelm.engine.audio_training import AudioTraining
from reelm.engine.optimisation import Optimisation
from reelm.engine.tokenizer_training import TokenizerTraining
from reelm.scripts.train import main
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.audio_discriminator import SoundAdversary, SoundDiscriminator
from reelm.tokenizers.quantizers import ResidualVQ

SMALL = ["audio.widths=[8,12,16]", "audio.quantizer.codes=32", "audio.quantizer.dim=4", "data.batch_size=2"]


def training(**options) -> AudioTraining:
    torch.manual_seed(0)
    tokenizer = SoundStream(ResidualVQ(16, 4, 2), (8, 12), (5,), patch=8, dilations=(1,))
    return AudioTraining(tokenizer, Optimisation(), windows=(128, 512), **options)


def loss_of(module: AudioTraining, sound: torch.Tensor) -> torch.Tensor:
    clip = Clip(torch.empty(len(sound), 3, 1, 1, 1, device="meta"), audio=sound, audio_rate=16_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no trainer to log to
        return module.training_step(Batch("sound", clip), 0)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    module = training(reconstruction_weight=2.0, spectral_weight=0.3, commitment_weight=0.2)
    sound = torch.rand(2, 2, 4000) - 0.5
    module.tokenizer(sound)  # the first codes
    module.tokenizer.quantizer.eval()
    terms, made, ids = module.losses(sound)
    assert made.shape == sound.shape and ids.shape == (2, 100, 2)
    want = 2 * (made - sound).abs().mean() + 0.3 * module.spectral(made, sound)
    torch.testing.assert_close(terms["reconstruction"], (made - sound).abs().mean())
    torch.testing.assert_close(loss_of(module, sound), want + 0.2 * terms.get("commitment", 0))


def test_emphasis_makes_a_soft_click_count():
    plain, raised = training(), training(emphasis=0.95)
    clock = torch.arange(2000) / 16_000
    voice, click = (
        loud * torch.sin(6.2832 * pitch * clock).expand(1, 2, -1) for loud, pitch in ((0.2, 200), (0.02, 4000))
    )

    def shares(module: AudioTraining) -> list[float]:
        errors = []
        for sound in (voice, click):
            module.tokenizer.forward = lambda signal, made=sound: (signal + made, None, {})
            errors.append(module.losses(torch.zeros(1, 2, 2000))[0]["reconstruction"].item())
        return errors

    (low, high), (low_raised, high_raised) = shares(plain), shares(raised)
    assert high < 0.2 * low and high_raised > low_raised


def test_all_parts_learn_and_so_does_the_adversary():
    module = training(adversary=SoundAdversary(SoundDiscriminator(width=4, window=128, scales=(1,))))
    loss_of(module, torch.rand(2, 2, 2000) - 0.5).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_adversary_of_the_other_signal_is_refused():
    with pytest.raises(ValueError, match="SoundAdversary and video takes Adversary"):
        TokenizerTraining(torch.nn.Identity(), Optimisation(), adversary=SoundAdversary(SoundDiscriminator(width=4)))
    with pytest.raises(ValueError, match="reconstruction is one of l2, l1, psnr; got l3"):
        training(reconstruction="l3")


def test_idle_levels_raise_the_alarm():
    module = training()
    module._seen = [torch.stack([torch.randint(16, (500,)), torch.zeros(500, dtype=torch.long)], -1)]
    with pytest.warns(UserWarning, match="level 1 uses 1 of its 16 codes for 500 latents"):
        module.on_validation_epoch_end()


def test_sound_alone_is_asked_for_and_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr("reelm.data.zoetrope.dataset.render", None)  # a call would fail
    module, data = training(), ClipData(Zoetrope(frames=5), Zoetrope("validation", frames=5), batch_size=3)
    module._trainer = SimpleNamespace(datamodule=data)
    module.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.clip.audio.shape == (3, 2, 10_000) and batch.clip.audio_rate == 16_000 and batch.clip.video.is_meta
    data.train = TokenShards.__new__(TokenShards)
    with pytest.raises(ValueError, match="trained on sound and TokenShards holds none"):
        module.setup("fit")


def test_a_run_writes_a_model_and_pictures(tmp_path, monkeypatch):
    run = ["train", "stage=audio_tokenizer", f"output={tmp_path}", "trainer.val_check_interval=2", *SMALL]
    run += ["data.train.frames=5", "data.validation_clips=2", "data.workers=0", "stage.windows=[256]"]
    monkeypatch.setattr("sys.argv", [*run, "trainer.max_steps=2", "trainer.precision=32-true"])
    main()
    tokenizer = store.load(tmp_path / "model")
    assert isinstance(tokenizer, SoundStream) and tokenizer.compression == 1000
    assert json.loads((tmp_path / "model/config.json").read_text())["notes"] == {"step": 2}
    assert (tmp_path / "samples/0000002.png").is_file()
    other = ["trainer.max_steps=1", f"init={tmp_path / 'model'}", f"output={tmp_path / 'b'}"]
    monkeypatch.setattr("sys.argv", [*run, *other, "trainer.precision=32-true"])
    main()
    assert (tmp_path / "b/model/model.safetensors").is_file()
