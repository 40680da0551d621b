"""Writing: what is written reads back, lasts as long as it should, and never stands half-made under its name."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from reelm.data import writing
from reelm.data.clip import Clip
from reelm.data.reading import probe, read_image, read_video
from reelm.data.writing import write_contact_sheet, write_image, write_video


def moving(frames: int = 17, height: int = 64, width: int = 64, fps: float = 8.0) -> Clip:
    """Soft gradients that drift, in all colours."""
    t = torch.linspace(0, 1, frames).view(-1, 1, 1)
    y, x = torch.linspace(0, 2, height).view(1, -1, 1), torch.linspace(0, 2, width).view(1, 1, -1)
    waves = [torch.sin(3 * x + 2 * t + 0 * y), torch.cos(2 * y - 2 * t + 0 * x), torch.sin(x + y + 3 * t)]
    return Clip(torch.stack(waves)[None] * 0.9, fps=fps)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
@pytest.mark.parametrize("fps", [8.0, 12.5, 23.976, 60.0])
def test_what_is_written_reads_back(tmp_path, name, fps):
    clip = moving(fps=fps)
    path = write_video(tmp_path / "new" / name, clip)
    again = read_video(path, fps=None, frames=None, size=None)
    assert again.video.shape == clip.video.shape
    assert (again.video - clip.video).abs().mean() < (8 if name == "a.gif" else 4) / 127.5  # a gif has 256 colours
    assert again.fps == pytest.approx(fps, rel=0.03 if name == "a.gif" else 1e-3)
    tolerance = 0.0051 if name == "a.gif" else 0.0011
    assert probe(path).duration == pytest.approx(17 / fps, abs=tolerance)
    assert os.listdir(tmp_path / "new") == [name]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_files_are_what_every_player_shows(tmp_path, name):
    path = write_video(tmp_path / name, moving(5, 33, 47))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p" and (stream.width, stream.height) == (48, 34)
        assert stream.codec_context.colorspace == 1  # BT.709, said in the file
    again = read_video(path, fps=None, frames=None, size=None).video[..., :33, :47]
    assert (again - moving(5, 33, 47).video).abs().mean() < 4 / 127.5


def test_an_mp4_plays_while_it_loads(tmp_path):
    data = write_video(tmp_path / "a.mp4", moving()).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_colours_survive(tmp_path):
    for name in ("a.mp4", "a.webm", "a.gif"):
        for colour in ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-0.2, 0.4, 0.9), (1.0, 1.0, 1.0), (-1.0, -1.0, -1.0)):
            video = torch.tensor(colour).view(1, 3, 1, 1, 1).expand(1, 3, 3, 32, 32)
            again = read_video(write_video(tmp_path / name, Clip(video)), frames=2, size=None).video
            assert (again - video[:, :, :2]).abs().max() < 7 / 127.5, (name, colour)


@pytest.mark.parametrize("rate", [16_000, 24_000, 11_025])
@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_sound_goes_along(tmp_path, name, rate):
    clip = moving()
    seconds = 17 / 8
    wave = torch.sin(2 * torch.pi * 440 * torch.arange(int(seconds * rate)) / rate)
    sides = torch.stack([0.8 * wave, 0.2 * wave])[None]
    path = write_video(tmp_path / name, clip.replace(audio=sides, audio_rate=rate))
    again = read_video(path, audio=True, audio_rate=rate)
    assert again.audio.shape[:2] == (1, 2) and abs(again.audio.shape[-1] - sides.shape[-1]) <= 1
    middle = slice(rate // 2, rate)
    assert (again.audio[0, 0, middle] - sides[0, 0, middle]).abs().max() < 0.12
    loud, soft = again.audio[0, :, middle].pow(2).mean(-1).sqrt()
    assert 3.3 < loud / soft < 4.8
    assert probe(path).duration == pytest.approx(seconds, abs=0.0011)


def test_long_sound_is_cut_and_gif_has_none(tmp_path):
    clip = moving().replace(audio=torch.rand(1, 1, 100_000) * 0.5, audio_rate=16_000)
    with av.open(str(write_video(tmp_path / "a.mp4", clip))) as container:
        assert container.duration / 1e6 == pytest.approx(17 / 8, abs=0.03)
    assert not probe(write_video(tmp_path / "a.gif", clip)).has_audio


@pytest.mark.parametrize(
    ("name", "clip", "message"),
    [
        ("a.avi", moving(), "'.*a.avi': .avi extension.*.mp4, .webm, .gif"),
        ("a", moving(), "no extension"),
        ("a.mp4", Clip(torch.zeros(2, 3, 1, 8, 8)), "batch of 2"),
        ("a.mp4", Clip(torch.zeros(1, 3, 2, 8, 8), fps=0.0), "0.0 fps"),
        ("a.mp4", Clip(torch.full((1, 3, 2, 8, 8), float("nan"))), "NaN"),
        ("a.mp4", Clip(torch.zeros(1, 3, 2, 8, 8), audio=torch.zeros(1, 1, 9)), "audio_rate"),
        ("a.mp4", Clip(torch.zeros(1, 3, 2, 8, 8), audio=torch.zeros(1, 5, 9), audio_rate=16_000), "5 channels"),
    ],
)
def test_what_cannot_be_written_says_why_and_leaves_nothing(tmp_path, name, clip, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, clip)
    assert os.listdir(tmp_path) == []


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, moving(3))
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_encode_sound", interrupted)  # the picture is written by then
    with pytest.raises(KeyboardInterrupt):
        write_video(path, moving(5).replace(audio=torch.zeros(1, 1, 99), audio_rate=16_000))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.mp4"]


def test_places_that_cannot_be_written_give_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "folder.mp4", Path("/proc/a.mp4")):
        with pytest.raises(OSError, match="cannot write .*a.mp4|cannot write .*folder.mp4") as caught:
            write_video(path, moving(3))
        assert "\n" not in str(caught.value) and "choose another output" in str(caught.value)


def test_images_read_back_exactly(tmp_path):
    clip = moving(4)
    pixels = (clip.video.add(1).mul(127.5).round() / 127.5 - 1)[:, :, 2:3]
    assert torch.allclose(
        read_image(write_image(tmp_path / "a.png", clip, frame=2), size=None).video, pixels, atol=1e-6
    )
    assert (read_image(write_image(tmp_path / "a.jpg", clip, frame=-2), size=None).video - pixels).abs().mean() < 0.02
    with pytest.raises(ValueError, match="frame=4"):
        write_image(tmp_path / "b.png", clip, frame=4)
    with pytest.raises(ValueError, match=".tga"):
        write_image(tmp_path / "b.tga", clip)


def test_a_contact_sheet_shows_every_sample(tmp_path):
    videos = torch.stack([torch.full((3, 9, 16, 24), level) for level in (-1.0, 0.0, 1.0)])
    videos[:, 0, -1] = 1.0  # the last frame is redder
    path = write_contact_sheet(tmp_path / "deep" / "sheet.png", videos, columns=3, scale=2, labels=["", "", ""])
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * (32 + 4), 160, 3)
    for row, level in enumerate((0, 128, 255)):
        y = row * 36 + 2 + 16
        assert abs(int(sheet[y, 10, 1]) - level) <= 1 and abs(int(sheet[y, 50 + 10, 1]) - level) <= 1
        assert sheet[y, 2 * 50 + 10, 0] == 255
    clip = moving(3).replace(captions=("a red star moves left while a blue circle bounces and a heart appears\nthere",))
    labelled = np.asarray(Image.open(write_contact_sheet(tmp_path / "labelled.png", clip)))
    assert labelled.shape[0] > 64 + 4 + 16 and (labelled[:16] < 100).any()  # dark letters above


@pytest.mark.parametrize(
    ("videos", "options", "message"),
    [
        (torch.zeros(3, 4, 8, 8), {}, "got \\(3, 4, 8, 8\\)"),
        (torch.zeros(2, 3, 4, 8, 8), {"labels": ["x"]}, "2 videos but 1 labels"),
        (torch.zeros(1, 3, 4, 8, 8), {"columns": 0}, "columns=0"),
    ],
)
def test_wrong_sheets_are_named(tmp_path, videos, options, message):
    with pytest.raises(ValueError, match=message):
        write_contact_sheet(tmp_path / "a.png", videos, **options)
