"""What is in the box fits its size, and does what its cards say."""

from pathlib import Path

import pytest
import torch

from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import store
from reelm.evaluation.reconstruction import psnr
from reelm.evaluation.sound import pitch_kept, si_sdr
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.streaming import encode_stream

BOX = Path(__file__).parents[1] / "pretrained"


def test_the_box_is_small():
    sizes = {path: path.stat().st_size for path in BOX.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 28e6
    assert sum(size for path, size in sizes.items() if path.parent.name == "audio") <= 1.4e6


@pytest.fixture(scope="module")
def audio() -> SoundStream:
    return store.load(BOX / "zoetrope/audio")


def test_zoetrope_s_sound_survives_its_tokens(audio):
    data = Zoetrope("validation")
    sound = torch.cat([data.sound(index).audio for index in range(8)])
    ids = audio.encode(sound)
    assert ids.shape == (8, 34, 4) and audio.vocabulary == 1024  # two latents a frame of video
    made = audio.decode(ids)[:, :, : sound.shape[2]]
    assert si_sdr(made, sound).mean() > 15 and pitch_kept(made, sound, audio.rate).all()
    left, right = made.square().mean(2).unbind(1)
    true_left, true_right = sound.square().mean(2).unbind(1)
    assert ((left / right).log10() - (true_left / true_right).log10()).abs().mean() < 0.15  # 1.5 dB on average
    coarse = audio.decode(ids[..., :2])[:, :, : sound.shape[2]]
    assert 5 < si_sdr(coarse, sound).mean() < si_sdr(made, sound).mean()


def test_zoetrope_s_tokens_can_be_streamed(audio):
    sound = Zoetrope("validation").sound(3).audio
    parts = encode_stream(audio, sound.split(1234, 2), latent_frames=2)
    assert torch.equal(torch.cat(list(parts), 1), audio.encode(sound))


@torch.no_grad()
def test_the_tokenizer_of_natural_video_is_small_causal_and_streams():
    folder = BOX / "natural/tokenizer"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    tokenizer = store.load(folder)
    assert tokenizer.compression == (4, 8, 8) and tokenizer.vocabulary == 2**18
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, 4), (17, 64, 64), mode="trilinear") * 2 - 1
    ids = tokenizer.encode(smooth)
    assert torch.equal(tokenizer.encode(smooth[:, :, :5]), ids[:, :2])
    assert torch.equal(torch.cat(list(encode_stream(tokenizer, smooth.split(5, 2), 2)), 1), ids)
    assert psnr(tokenizer.decode(ids), smooth) > 24
