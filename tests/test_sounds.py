"""Sound as training data: of any file that has some, and of Zoetrope, without its pictures."""

import math
import struct
import tarfile
import wave
from pathlib import Path

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.folder import SoundFolder, VideoFolder
from reelm.data.module import Batches, Group, Request
from reelm.data.reading import VideoError
from reelm.data.sounds import SoundReader
from reelm.data.tars import Tars
from reelm.data.writing import write_video
from reelm.data.zoetrope.dataset import Zoetrope

RATE = 16_000


def write_wav(path: Path, seconds: float, rate: int = RATE, pitch: float = 440.0, channels: int = 1) -> Path:
    """A tone that is silent in its first half."""
    count = round(seconds * rate)
    samples = [0.0 if i < count // 2 else 0.5 * math.sin(2 * math.pi * pitch * i / rate) for i in range(count)]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", round(32767 * s)) * channels for s in samples))
    return path


def write_clip(path: Path, seconds: float = 2.0) -> Path:
    frames = round(seconds * 8)
    audio = 0.4 * torch.sin(2 * math.pi * 300 * torch.arange(round(seconds * RATE)) / RATE).expand(1, 2, -1)
    audio = audio * torch.tensor([1.0, 0.1]).view(1, 2, 1)
    return write_video(path, Clip(torch.zeros(1, 3, frames, 32, 32), 8.0, audio=audio, audio_rate=RATE))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_files_of_sound_alone_are_read_at_any_rate(tmp_path, rate):
    path = write_wav(tmp_path / "a.wav", 2.0, rate)
    with SoundReader(path) as reader:
        assert reader.duration() == pytest.approx(2.0, abs=0.01)
        sound = reader.read(0.5, 1.0, RATE)
    assert sound.shape == (1, 2, RATE) and torch.equal(sound[:, 0], sound[:, 1])
    assert sound[..., : RATE // 2 - 100].abs().max() < 0.01 and sound[..., RATE // 2 + 100 :].abs().max() > 0.3


def test_after_its_end_a_sound_is_silent(tmp_path):
    with SoundReader(write_wav(tmp_path / "a.wav", 1.0)) as reader:
        sound = reader.read(0.0, 2.0, RATE)
    assert sound.shape == (1, 2, 2 * RATE) and sound[..., RATE + 100 :].abs().max() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"this is no sound at all" * 50, "damaged|not in a format")],
)
def test_what_is_no_sound_is_named(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(VideoError, match=message):
        SoundReader(tmp_path / "a.wav")


def test_a_silent_movie_holds_no_sound(tmp_path):
    path = write_video(tmp_path / "a.mp4", Clip(torch.zeros(1, 3, 5, 32, 32)))
    with pytest.raises(VideoError, match="holds no sound"):
        SoundReader(path)


def test_a_folder_of_clips_and_sounds(tmp_path):
    (tmp_path / "below").mkdir()
    write_wav(tmp_path / "below" / "tone.wav", 3.0)
    (tmp_path / "below" / "tone.txt").write_text("a tone")
    write_clip(tmp_path / "clip.mp4")
    (tmp_path / "notes.md").write_text("no sound")
    data = SoundFolder(tmp_path, frames=5, random=())
    assert data.keys == ["below/tone.wav", "clip.mp4"]
    tone, clip = data.sound(0, RATE), data.sound(1, 24_000)
    assert tone.audio.shape == (1, 2, 10_000) and tone.captions == ("a tone",) and tone.video.is_meta
    assert clip.audio.shape == (1, 2, 15_000) and clip.audio_rate == 24_000 and clip.frames == 5
    left, right = clip.audio[0].square().mean(1)
    assert left > 20 * right
    assert VideoFolder(tmp_path, frames=5, random=()).keys == ["clip.mp4"]
    whole = VideoFolder(tmp_path, frames=5, random=(), audio=True).get(0)
    part = data.sound(1, RATE).audio
    assert (part - whole.audio)[..., 200:-200].abs().max() < 0.02


def test_starts_are_drawn_anew_in_each_pass_and_parts_lie_in_turn(tmp_path):
    write_wav(tmp_path / "a.wav", 4.0)
    drawn = SoundFolder(tmp_path, frames=8)
    first, again, other = drawn.sound(0, RATE), drawn.sound(0, RATE), drawn.sound(0, RATE, draw=1)
    assert torch.equal(first.audio, again.audio) and not torch.equal(first.audio, other.audio)
    parts = SoundFolder(tmp_path, frames=8, clips_per_video=2, random=())
    assert parts.sound(0, RATE).audio.abs().max() == 0 and parts.sound(1, RATE).audio.abs().max() > 0.3


def test_what_has_no_sound_is_replaced_and_named(tmp_path):
    write_video(tmp_path / "a.mp4", Clip(torch.zeros(1, 3, 5, 32, 32)))
    write_clip(tmp_path / "b.mp4")
    data = SoundFolder(tmp_path, frames=5, random=())
    with pytest.warns(UserWarning, match="holds no sound"):
        assert data.sound(0, RATE).keys == ("b.mp4",)
    assert list(data.failures) == ["a.mp4"]


def test_sound_comes_out_of_tars(tmp_path):
    write_clip(tmp_path / "a.mp4")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "a.mp4")
    data = Tars(tmp_path / "all.tar", frames=5, random=())
    assert data.sound(0, RATE).audio[0, 0].abs().max() > 0.3


def test_zoetrope_sounds_without_being_drawn(monkeypatch):
    data = Zoetrope("validation", size=(32, 48), frames=9, audio=True, length=10)
    whole = data.get(3)
    monkeypatch.setattr("reelm.data.zoetrope.dataset.render", None)  # a call would fail
    alone = data.sound(3)
    assert torch.equal(alone.audio, whole.audio) and alone.captions == whole.captions and alone.keys == whole.keys
    assert alone.video.is_meta and alone.video.shape == whole.video.shape
    assert data.sound(3, 8_000).audio.shape == (1, 2, 9_000)
    with pytest.raises(ValueError, match="an image has no sound"):
        data.sound(3, frames=1)


def test_a_group_asks_for_sound():
    group = Group("sound", sound=8_000, frames=5)
    batch = Batches(Zoetrope(length=10), [[Request(2, group)]])[0]
    assert batch.name == "sound" and batch.clip.audio.shape == (1, 2, 5_000) and batch.clip.audio_rate == 8_000
