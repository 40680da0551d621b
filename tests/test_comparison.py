"""A clip beside its reconstructions: what is read, what is shown, what the figures say."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from reelm.data.clip import Clip
from reelm.data.reading import probe, read_image, read_video
from reelm.data.writing import side_by_side, write_video
from reelm.engine import comparison, store
from reelm.engine.comparison import Comparison, compare, large_enough, load_lpips, load_tokenizer, read, run, table
from reelm.lm.transformer import Transformer
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.perceptual import alexnet
from reelm.tokenizers.quantizers import FSQ, ResidualVQ
from reelm.tokenizers.tokenizer import VideoTokenizer

STEP = (4, 8, 8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("box") / "tokenizer"
    model = MAGVIT2(FSQ((8, 8, 8)), (16, 16), ((1, 2, 2),), (1, 1), ((1, 3, 3), (3, 3, 3)), (4, 4, 4))
    store.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A photo of odd size, a clip of odd size and another rate, one of a single pixel, and what is none."""
    folder = tmp_path_factory.mktemp("material")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (77, 131, 3), dtype=np.uint8)).save(folder / "photo.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    t, y, x = torch.meshgrid(torch.arange(20), torch.arange(51), torch.arange(70), indexing="ij")
    waves = [torch.sin(x / 5 + t / 4), torch.cos(y / 7 - t / 3), torch.sin((x + y) / 9)]
    write_video(folder / "odd.gif", Clip(torch.stack(waves)[None] * 0.8, fps=12.5))
    (folder / "text.mp4").write_text("no video")
    return folder


def lpips_files(folder, suffix=""):
    """Random weights in the files' form."""
    layers, taps = alexnet()
    features = {f"features.{name}": weight.numpy() for name, weight in layers.state_dict().items()}
    np.savez(folder / f"features{suffix}.npz", **features)
    sizes = [64, 192, 384, 256, 256]
    linear = {f"alex.lin{i}.model.1.weight": np.random.rand(1, n, 1, 1).astype(np.float32) for i, n in enumerate(sizes)}
    np.savez(folder / f"linear{suffix}.npz", **linear)
    return folder / f"features{suffix}.npz"


def notes(function, *arguments):
    said = []
    return function(*arguments, said.append), said


def test_all_that_is_promised(tokenizer, material, tmp_path, capsys):
    output = tmp_path / "new" / "odd.webm"
    features = lpips_files(tmp_path)
    wanted = Comparison(str(material / "odd.gif"), str(tokenizer), str(output), lpips=str(features))
    assert run(wanted, {"video": "odd.gif"}) == [output, output.with_suffix(".png"), output.with_suffix(".json")]
    said = capsys.readouterr()
    assert "20 x 70 x 51 do not fit the tokenizer: it sees 21 x 72 x 56, the edges repeated" in said.err
    assert "20 frames of 70 x 51 at 12.5 a second" in said.out and "LPIPS-alex" in said.out

    shown = read_video(output, fps=None, frames=None, size=None)
    assert shown.frames == 20 and shown.size == (51 + 16 + 1, 4 * 70 + 3 * 4) and shown.fps == pytest.approx(12.5)
    original = read_video(material / "odd.gif", fps=None, frames=20, size=None).video
    assert (shown.video[..., 16:67, :70] - original).abs().mean() < 0.1
    assert probe(output.with_suffix(".png")).size[1] >= 6 * 64

    record = json.loads(output.with_suffix(".json").read_text())
    assert (record["frames"], record["size"], record["config"]) == (20, [51, 70], {"video": "odd.gif"})
    assert record["tokenizer"]["fingerprint"] == store.fingerprint(store.load(tokenizer))
    own, h264, vp9 = (record["results"][name] for name in ("tokenizer", "h264", "vp9"))
    assert own["tokens"] == 6 * 7 * 9 and own["vocabulary"] == 512 and own["bits_per_token"] == 9
    assert own["bits"] == 9 * own["tokens"] and own["bits_per_pixel"] == own["bits"] / (20 * 51 * 70)
    assert 0 < own["entropy"] <= math.log2(own["codes_used"]) and own["perplexity"] == pytest.approx(
        2 ** own["entropy"]
    )
    for result in (own, h264, vp9):
        assert 0 < result["psnr"] < 60 and -1 < result["ssim"] < 1 and result["lpips_alex"] > 0
    assert h264["same_bits"] == (h264["bits"] <= 1.02 * own["bits"])


def test_a_tokenizer_without_loss_is_seen_to_have_none(material):
    class One(torch.nn.Module):
        vocabulary, pieces = 2, []

        def forward(self, z):
            self.pieces.append(z)
            return z, torch.zeros(1, -(-z.shape[2] // 4), 8, 8, dtype=torch.long), {}

        def lookup(self, ids):
            return self.pieces.pop(0)

    class Perfect(VideoTokenizer):
        compression, quantizer, device = (1, 1, 1), One(), torch.device("cpu")

        def encode_latents(self, video, past):
            return video

        decode_latents = encode_latents

    clip = Clip(torch.rand(1, 3, 17, 64, 64) * 2 - 1)
    results, said = notes(compare, clip, Perfect(), ("h264",), None)
    perfect = results[0].figures
    assert perfect["psnr"] > 100 and perfect["ssim"] == pytest.approx(1) and math.isfinite(perfect["psnr"])
    assert perfect["codes_used"] == perfect["perplexity"] == 1 and perfect["entropy"] == 0
    assert not results[1].figures["same_bits"]  # noise in 320 bits
    assert said[0].startswith("h264 cannot go below ")
    assert "lpips" not in table(results).lower()


def test_a_clip_is_heard_as_its_tokens_tell_it(tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    audio = SoundStream(ResidualVQ(16, 4, 2), (8, 8), (5,), rate=8000, patch=8, dilations=(1,))
    audio(torch.rand(1, 2, 4000) - 0.5)  # the first codes
    store.save(audio.eval(), tmp_path / "audio")
    clip = Clip(torch.zeros(1, 3, 9, 32, 32), 8.0, audio=torch.rand(1, 2, 18_000) - 0.5, audio_rate=16_000)
    clip, mute = write_video(tmp_path / "a.mp4", clip), write_video(tmp_path / "b.mp4", clip.replace(audio=None))
    wanted = {
        "model": str(tokenizer),
        "codecs": (),
        "audio_model": str(tmp_path / "audio"),
        "output": str(tmp_path / "c.mp4"),
    }
    run(Comparison(str(clip), **wanted), {})
    said = capsys.readouterr()
    assert f"{225 * 2} tokens, 1,600 bits a second" in said.out and "sound: SNR" in said.out
    sound = json.loads((tmp_path / "c.json").read_text())["sound"]
    assert sound["fingerprint"] == store.fingerprint(audio) and sound["tokens"] == 450 and len(sound["codes_used"]) == 2
    assert probe(tmp_path / "c.mp4").has_audio
    run(Comparison(str(mute), **wanted), {})
    assert "b.mp4 has no sound" in capsys.readouterr().err and not probe(tmp_path / "c.mp4").has_audio
    with pytest.raises(ValueError, match="holds a MAGVIT2, which is no audio tokenizer"):
        run(Comparison(str(mute), **wanted | {"audio_model": str(tokenizer)}), {})


def test_a_photo_is_a_clip_of_one_frame(tokenizer, material, tmp_path):
    output = tmp_path / "photo.mp4"
    run(Comparison(str(material / "photo.png"), str(tokenizer), str(output), codecs=("vp9",)), {})
    assert read_image(output, size=None).size == (77 + 16 + 1, 3 * 131 + 2 * 4 + 1)  # 4:2:0 has even sides
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["frames"] == 1 and record["results"]["tokenizer"]["tokens"] == 10 * 17


def test_without_codecs(tokenizer, material, tmp_path):
    output = tmp_path / "a.gif"
    run(Comparison(str(material / "odd.gif"), str(tokenizer), str(output), frames=5, codecs=()), {})
    assert read_video(output, fps=None, frames=None, size=None).size == (51 + 16, 2 * 70 + 4)
    assert list(json.loads(output.with_suffix(".json").read_text())["results"]) == ["tokenizer"]


@pytest.mark.parametrize(
    ("wanted", "shape", "rate", "said"),
    [
        ({}, (20, 51, 70), 12.5, 0),
        ({"frames": 10}, (10, 51, 70), 12.5, 0),
        ({"size": 40, "frames": 1}, (1, 40, 40), 12.5, 0),
        ({"size": (33, 50), "frames": 1}, (1, 33, 50), 12.5, 0),
        ({"fps": 5.0, "frames": 5}, (5, 51, 70), 5.0, 0),
        ({"start": 1.2}, (5, 51, 70), 12.5, 0),
    ],
)
def test_what_is_read(material, wanted, shape, rate, said):
    clip, texts = notes(read, Comparison(str(material / "odd.gif"), **wanted))
    assert tuple(clip.video.shape[2:]) == shape and clip.fps == pytest.approx(rate) and len(texts) == said


def test_large_videos_are_made_smaller(material, monkeypatch):
    monkeypatch.setattr(comparison, "MOST_PIXELS", 2000)
    clip, texts = notes(read, Comparison(str(material / "odd.gif"), frames=1))
    assert clip.size == (38, 52)
    assert texts[0].startswith("1 frames of 70 x 51 are large: made 52 x 38; fewer frames=... or size=")


def test_small_pictures_grow(material):
    clip, _ = notes(read, Comparison(str(material / "dot.png")))
    assert clip.size == (32, 32) and (clip.video[0, 0] > 0.9).all() and (clip.video[0, 1:] < -0.9).all()
    video = torch.arange(5.0).expand(1, 3, 2, 40, 5)
    grown = large_enough(video)
    assert grown.shape[3:] == (40, 32) and torch.equal(grown[..., 13:18], video) and (grown[..., :13] == 0).all()


def test_large_frames_are_made_in_tiles(tokenizer, material, tmp_path, capsys):
    for memory in ("1MB", None):
        output = str(tmp_path / "a.mp4")
        run(Comparison(str(material / "photo.png"), str(tokenizer), output, codecs=(), memory=memory), {})
        assert ("tiles (memory=1MB)" in capsys.readouterr().err) == (memory is not None)
    with pytest.raises(ValueError, match="memory=1kB is too little: 17 frames of 16 x 16 alone take"):
        run(Comparison(str(material / "photo.png"), str(tokenizer), str(tmp_path / "a.mp4"), memory="1kB"), {})


def test_panels_stand_beside_each_other():
    videos = torch.stack([torch.full((3, 2, 32, 40), value) for value in (-1.0, 0.0, 1.0)])
    row = side_by_side(videos, ["original", "a label that is longer than its picture", "x"])
    assert row.shape == (1, 3, 2, 48, 128)
    assert (row[..., 16:, :40] == -1).all() and (row[..., 16:, 44:84] == 0).all() and (row[..., 40:44] == 1).all()
    assert (row[..., :16, 84:88] == 1).all() and row[..., :16, :40].min() < 0


def test_a_tokenizer_is_found_in_its_model(tokenizer):
    assert load_tokenizer(str(tokenizer.parent))[1] == load_tokenizer(str(tokenizer))[1] == tokenizer


def test_linear_layers_are_found_beside(tmp_path):
    features = lpips_files(tmp_path)
    assert load_lpips(str(features), None).network == "alex"
    lpips_files(tmp_path, "2")
    with pytest.raises(ValueError, match="2 files of linear layers .* give lpips_linear="):
        load_lpips(str(features), None)
    assert load_lpips(str(features), str(tmp_path / "linear2.npz")).network == "alex"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_lpips(str(tmp_path / "nothing.npz"), None)


def test_other_models_are_no_tokenizers(tmp_path):
    store.save(Transformer(32, 1, 2, sites=(8, 8, 8)), tmp_path / "lm")
    with pytest.raises(ValueError, match="holds a Transformer, which is no video tokenizer"):
        load_tokenizer(str(tmp_path / "lm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codecs": ("h264", "h266")}, "codec 'h266' is unknown; choose from h264, vp9"),
        ({"video": "nowhere.mp4"}, "nowhere.mp4"),
        ({"video": "text.mp4"}, "text.mp4: is damaged or no video"),
        ({"model": "nowhere"}, "no model nowhere: give a folder"),
        ({"model": "."}, "no model at"),
        ({"output": "text.mp4/a.mp4"}, "output folder .*text.mp4 cannot be written"),
        ({"output": "a.avi"}, r"\.avi extension cannot be written"),
        ({"output": "odd.gif"}, "would overwrite the video"),
        ({"video": "photo.png", "output": "photo.mp4"}, "would overwrite the video"),
        ({"size": 0}, "size=0 is no size"),
        ({"size": (64, 64, 64)}, "is no size"),
        ({"size": (64, 64.5)}, "is no size"),
        ({"size": 1 << 20}, "is no size"),
        ({"size": "big"}, "size='big' is no number"),
        ({"fps": "fast"}, "fps='fast' is no number"),
        ({"fps": 0.0}, "fps=0.0 is no frame rate"),
        ({"memory": "much"}, "memory=much is no amount of memory; give bytes, or a number with MB or GB"),
        ({"frames": 0}, "frames=0 is no number of frames"),
        ({"frames": 6.5}, "frames=6.5 is no number of frames"),
        ({"start": 100.0}, "ends before start=100 s"),
        ({"lpips": "text.mp4"}, "linear layers stand beside"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(changes, message, tokenizer, material, tmp_path, monkeypatch):
    monkeypatch.chdir(material)
    arguments = {"video": "odd.gif", "model": str(tokenizer), "output": str(tmp_path / "a.mp4")} | changes
    before = sorted(material.iterdir())
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(Comparison(**arguments), {})
    assert "\n" not in str(caught.value)
    assert sorted(material.iterdir()) == before and not list(tmp_path.iterdir())
