"""The suite `reconstruction`: means of what each way to store a clip keeps of it."""

import json

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.writing import write_video
from reelm.engine import store
from reelm.engine.reconstruction import Reconstructions
from reelm.evaluation.reconstruction import psnr
from reelm.tokenizers.closed_loop import ClosedLoop
from reelm.tokenizers.quantizers import FSQ, Continuous


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A tokenizer of random weights, and two videos that stand still."""
    folder = tmp_path_factory.mktemp("box")
    torch.manual_seed(0)
    tokenizer = ClosedLoop(FSQ((4, 4)), (4, 4, 4), 16, 1, 1, 1)
    store.save(tokenizer, folder / "tokenizer")
    (folder / "videos").mkdir()
    for name, grey in (("dark", -0.5), ("light", 0.25)):
        write_video(folder / "videos" / f"{name}.mp4", Clip(torch.full((1, 3, 12, 48, 64), grey), fps=10.0), quality=8)
    (folder / "videos" / "notes.txt").write_text("no video")
    return folder


def test_means_are_of_what_was_measured(box, tmp_path):
    said = []
    suite = Reconstructions(str(box / "videos"), sizes=[32, 48], frames=5, clips_per_video=2)
    report = suite.judge(str(box / "tokenizer"), sheets=tmp_path, show=said.append)
    json.dumps(report)
    assert set(report["sizes"]) == {"32", "48"} and len(said) == 2
    found = report["sizes"]["48"]
    assert set(found["videos"]) == {"dark", "light"}
    # grey videos: the whole clip is one colour, so the figure of a file can be told from its tokenizer alone
    tokenizer = store.load(box / "tokenizer")
    with torch.no_grad():
        video = torch.full((1, 3, 5, 48, 48), 0.25)
        want = float(psnr(tokenizer.decode(tokenizer.encode(video)), video))
    assert found["videos"]["light"]["tokenizer"]["psnr"] == pytest.approx(want, abs=0.3)
    for name in ("tokenizer", "h264"):
        mean = sum(found["videos"][video][name]["psnr"] for video in ("dark", "light")) / 2
        assert found["mean"][name]["psnr"] == pytest.approx(mean)
    assert found["mean"]["h264"]["psnr"] > 35
    assert found["mean"]["tokenizer"]["bits_per_pixel"] == pytest.approx(2 * 12 * 12 * 4 / (5 * 48 * 48))
    assert found["codes"]["vocabulary"] == 16 and 1 <= found["codes"]["codes_used"] <= 16
    assert (tmp_path / "reconstruction_48.png").is_file() and "light" in said[1] and "of 16 codes used" in said[1]


def test_videos_of_one_name_are_told_apart(box, tmp_path):
    other = write_video(tmp_path / "dark.mp4", Clip(torch.full((1, 3, 12, 48, 64), 0.9), fps=10.0))
    videos = [str(box / "videos" / "dark.mp4"), str(other), str(box / "videos" / "light.mp4")]
    report = Reconstructions(videos, sizes=[32], frames=5, clips_per_video=1).judge(str(box / "tokenizer"))
    assert set(report["sizes"]["32"]["videos"]) == {*videos[:2], "light"}


def test_latents_are_measured_too(box, tmp_path):
    store.save(ClosedLoop(Continuous(3), (4, 4, 4), 16, 1, 1, 1), tmp_path)
    said = []
    suite = Reconstructions(str(box / "videos"), sizes=[32], frames=5, clips_per_video=1, codecs=())
    found = suite.judge(str(tmp_path), show=said.append)["sizes"]["32"]
    assert found["codes"] == {"numbers_per_token": 3, "bits_per_token": 48.0}
    assert found["mean"]["tokenizer"]["bits_per_pixel"] == pytest.approx(2 * 8 * 8 * 48 / (5 * 32 * 32))
    assert said[0].endswith("latents of 3 numbers, 16 bits each")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": "nowhere"}, "no video nowhere; videos=... is a folder or a list"),
        ({"videos": []}, "needs videos=..."),
        ({"frames": 6}, "6 frames of 32 x 32 does not fit"),
        ({"sizes": [16]}, "LPIPS takes no less than 32"),
        ({"clips_per_video": 0}, "clips_per_video=0 must be 1 or more"),
        ({"codecs": ["mpeg7"]}, "codec 'mpeg7' is unknown"),
    ],
)
def test_mistakes_are_named(box, change, message):
    settings = {"videos": str(box / "videos"), "sizes": [32], "frames": 5} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Reconstructions(**settings).judge(str(box / "tokenizer"))
