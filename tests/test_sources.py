"""Folders, lists and tars of real videos: captions, splits, parts, bad files; the same index gives the same clip."""

import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reelm.data.clip import Clip
from reelm.data.folder import Manifest, VideoFolder, share_of
from reelm.data.reading import VideoError, read_video
from reelm.data.tars import Member, Section, Tars, index_tar
from reelm.data.writing import write_image, write_video


def ramp(level: float, frames: int = 24) -> Clip:
    """A clip whose frames get brighter from `level` on, so that a picture tells its time."""
    times = torch.linspace(0, 0.5, frames).view(1, 1, -1, 1, 1)
    return Clip((level + times).expand(1, 3, frames, 48, 64).clone(), fps=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_video(root / "inner" / f"clip{number}.mp4", ramp(-0.9 + 0.4 * number))
        (root / "inner" / f"clip{number}.txt").write_text(f"number {number}\n", encoding="utf-8")
    (root / "inner" / "clip3.txt").unlink()
    (root / "inner" / "clip3.json").write_text(json.dumps({"caption": " number\n3 ", "fps": 8}))
    (root / "inner" / ".hidden.mp4").write_bytes(b"")
    write_image(root / "still.png", ramp(0.0))
    return root


def test_a_folder_gives_clips_with_their_captions(folder):
    videos = VideoFolder(folder, frames=5, size=32)
    assert len(videos) == 4
    for index, clip in enumerate([videos[i] for i in range(4)]):
        assert clip.video.shape == (1, 3, 5, 32, 32) and clip.fps == 8.0
        assert clip.captions == (f"number {index}",) == (videos.caption(index),)
        assert clip.keys == (f"inner/clip{index}.mp4",)
    assert videos.get(2, frames=1).video.shape == (1, 3, 1, 32, 32)
    other = videos.get(2, frames=3, size=(16, 24), fps=4.0)
    assert other.video.shape == (1, 3, 3, 16, 24) and other.fps == 4.0
    assert set(videos.get(0, controls=("flow", "depth")).controls) == {"flow", "depth"}
    with pytest.raises(ValueError, match="camera"):
        videos.get(0, controls=("camera",))
    with pytest.raises(IndexError, match="0 to 3"):
        videos[4]


def test_pictures_count_for_clips_of_one_frame(folder):
    pictures = VideoFolder(folder, frames=1, size=16)
    assert len(pictures) == 5 and pictures[4].keys == ("still.png",)


def test_parts_of_a_video_follow_each_other(folder):
    videos = VideoFolder(folder, frames=5, size=8, clips_per_video=4, random=())
    assert len(videos) == 16
    means = [videos[i].video.mean().item() for i in range(4)]
    assert means == sorted(means) and means[3] - means[0] > 0.3
    first, last = read_video(folder / "inner/clip0.mp4", frames=24, size=8).video[0, 0, [0, -1], 4, 4].tolist()
    assert videos[0].video[0, 0, 0, 4, 4] == pytest.approx(first, abs=0.02)
    assert videos[3].video[0, 0, -1, 4, 4] == pytest.approx(last, abs=0.04)


def test_what_is_drawn_depends_on_seed_index_and_draw_alone(folder):
    options = dict(frames=5, size=(16, 16), clips_per_video=3, random=("start", "crop", "flip"))
    first, again = VideoFolder(folder, seed=1, **options), VideoFolder(folder, seed=1, **options)
    later = again[7]
    assert torch.equal(first[7].video, later.video) and torch.equal(first[3].video, again[3].video)
    other = VideoFolder(folder, seed=2, **options)
    assert any(not torch.equal(first[i].video, other[i].video) for i in range(4))
    assert torch.equal(first.get(7, draw=3).video, again.get(7, draw=3).video)
    assert any(not torch.equal(first[i].video, first.get(i, draw=1).video) for i in range(4))
    still = VideoFolder(folder, frames=5, size=16, random=())
    assert torch.equal(still[0].video, still.get(0, draw=1).video)


def test_flipping_swaps_left_and_right(tmp_path):
    video = torch.full((1, 3, 5, 32, 32), -1.0)
    video[..., 16:] = 1.0
    wave = torch.stack([torch.zeros(10_000), torch.rand(10_000) * 2 - 1])[None]
    write_video(tmp_path / "a.mp4", Clip(video, fps=8.0, audio=wave, audio_rate=16_000))
    seen = set()
    for seed in range(12):
        clip = VideoFolder(tmp_path, frames=5, size=32, random=("flip",), audio=True, seed=seed)[0]
        right = bool(clip.video[..., 28].mean() > 0)
        assert bool(clip.audio[0, 1].abs().mean() > clip.audio[0, 0].abs().mean()) == right
        seen.add(right)
    assert seen == {True, False}


def test_sound_has_one_shape_whether_there_is_a_track_or_not(folder):
    clip = VideoFolder(folder, frames=5, audio=True)[0]
    assert clip.audio.shape == (1, 2, 10_000) and clip.audio_rate == 16_000 and clip.audio.abs().max() == 0
    assert VideoFolder(folder, frames=5, audio=True).get(0, frames=1).audio is None


def test_splits_part_the_videos_for_good(folder, tmp_path):
    names = ["clip1", "inner/clip2.mp4"]
    train, validation = (VideoFolder(folder, split=split, held_out=names) for split in ("train", "validation"))
    assert [validation.caption(i) for i in range(2)] == ["number 1", "number 2"]
    assert [train.caption(i) for i in range(2)] == ["number 0", "number 3"]
    assert share_of("inner/clip0.mp4") == pytest.approx(0.4243238139853841)  # on every machine, for ever
    for number in range(200):
        (tmp_path / f"{number}.mp4").touch()
    train, validation = (VideoFolder(tmp_path, split=split, held_out=0.2) for split in ("train", "validation"))
    assert len(train) + len(validation) == 200 and 25 <= len(validation) <= 55
    with pytest.raises(ValueError, match="no video of 4 is in split='validation'"):
        VideoFolder(folder, split="validation", held_out=0.0)


def test_bad_files_are_replaced_and_named_once(folder, tmp_path):
    good = (folder / "inner/clip1.mp4").read_bytes()
    for name, data in (("a", b""), ("b", good[:500]), ("c", good), ("d", b"not a video" * 50), ("e", good)):
        (tmp_path / f"{name}.mp4").write_bytes(data)
    videos = VideoFolder(tmp_path, frames=5, size=16)
    with pytest.warns(UserWarning, match="a.mp4: is empty"):
        clip = videos[0]
    assert clip.keys == ("c.mp4",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(videos[0].video, clip.video)
    with pytest.warns(UserWarning, match="d.mp4"):
        assert videos[3].keys == ("e.mp4",)
    assert set(videos.failures) == {"a.mp4", "b.mp4", "d.mp4"}
    with pytest.raises(VideoError, match="is empty"):
        videos.read(0)
    fresh = VideoFolder(tmp_path, frames=5, size=16)
    with pytest.warns(UserWarning):
        assert torch.equal(fresh[1].video, videos[1].video)  # what was met before does not matter


def test_clips_that_are_too_short_make_way_for_longer_ones(folder, tmp_path):
    write_video(tmp_path / "a.mp4", ramp(0.0, frames=3))
    write_video(tmp_path / "b.mp4", ramp(0.0, frames=9))
    videos = VideoFolder(tmp_path, frames=5, size=16)
    with pytest.warns(UserWarning, match="has 3 frames at 8 fps"):
        assert videos[0].keys == ("b.mp4",)
    assert videos.get(0, frames=3).keys == ("a.mp4",)


def test_nothing_readable_is_one_line(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_bytes(b"x" * 100)
    with pytest.warns(UserWarning), pytest.raises(VideoError, match="3 videos in a row") as caught:
        VideoFolder(tmp_path)[1]
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no videos there"):
        VideoFolder(_made(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        VideoFolder(tmp_path / "nowhere")


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_lists_in_csv_and_jsonl(folder):
    lines = [{"file_name": "inner/clip0.mp4", "text": "one, two"}, {"file_name": "inner/clip1.mp4", "text": "three"}]
    listed = folder / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8-sig")
    table = folder / "list.csv"
    table.write_text('videos,prompt\ninner/clip0.mp4,"one, two"\ninner/clip1.mp4,three\n')
    for path in (listed, table):
        videos = Manifest(path, frames=3, size=16)
        assert [videos[i].captions[0] for i in range(2)] == ["one, two", "three"]
        assert videos[1].keys == ("inner/clip1.mp4",)
    table.write_text("path\ninner/clip2.mp4\n")
    assert Manifest(table).caption(0) == "number 2"  # the file beside the video
    table.write_text("path\nhttps://example.org/a.mp4\ninner/clip2.mp4\n")
    with pytest.warns(UserWarning, match="not a local file"):
        assert Manifest(table, frames=3)[0].keys == ("inner/clip2.mp4",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "name,caption\nx,y\n", "entry 1 .*names no video in path"),
        ("a.jsonl", '{"path": "x"}\nnot json\n', "entry 2"),
        ("a.jsonl", "[1]\n", "entry 1"),
        ("a.csv", "", "no videos there"),
        ("a.parquet", "", ".csv or .jsonl"),
    ],
)
def test_a_wrong_list_names_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Manifest(tmp_path / name)


@pytest.fixture
def tars(folder, tmp_path) -> Path:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(3):
            tar.add(folder / "inner" / f"clip{number}.mp4", f"{number:05d}.mp4")
            for suffix, data in ((".txt", f"tar {number}".encode()), (".json", b'{"caption": "from json"}')):
                if number < 2 or suffix == ".json":
                    member = tarfile.TarInfo(f"{number:05d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return tmp_path


def test_tars_are_read_in_place(folder, tars):
    videos = Tars(tars, frames=5, size=16, random=())
    assert [videos.caption(i) for i in range(3)] == ["tar 0", "tar 1", "from json"]
    assert videos[1].keys == ("00000.tar/00001.mp4",)
    assert torch.equal(videos[1].video, VideoFolder(folder, frames=5, size=16, random=())[1].video)
    assert sorted(os.listdir(tars)) == ["00000.tar"]
    assert len(Tars([tars / "00000.tar"], clips_per_video=2)) == 6


def test_a_section_behaves_like_a_file(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with open(tmp_path / "f", "rb") as file:
        section = Section(file, Member("f", 10, 20), "part")
        assert section.read() == bytes(range(10, 30)) and section.read(5) == b""
        assert section.seek(-4, os.SEEK_END) == 16 and section.read(100) == bytes(range(26, 30))
        assert section.seek(0) == 0 and section.read(3) == bytes(range(10, 13)) and section.tell() == 3


def test_dangerous_members_are_passed_over(folder, tmp_path):
    data = (folder / "inner/clip0.mp4").read_bytes()
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in {
            "../up.mp4": tarfile.REGTYPE, "/etc/absolute.mp4": tarfile.REGTYPE, "good.mp4": tarfile.REGTYPE,
            "link.mp4": tarfile.SYMTYPE, "hard.mp4": tarfile.LNKTYPE, "null.mp4": tarfile.CHRTYPE,
            "pipe.mp4": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE,
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(data) if member.size else None)
    with pytest.warns(UserWarning, match="6 members are passed over"):
        names = [name for name, _ in index_tar(str(path))]
    assert names == ["good.mp4"]


def test_damaged_and_packed_tars_say_so(tars, tmp_path):
    whole = (tars / "00000.tar").read_bytes()
    for packing in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"x.tar.{packing}", f"w:{packing}") as tar:
            tar.add(tars / "00000.tar", "a.mp4")
        with pytest.raises(ValueError, match="is packed with"):
            Tars(tmp_path / f"x.tar.{packing}")
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 300])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert len(Tars(tmp_path / "cut.tar")) in (1, 2)
        except ValueError as error:
            assert "no whole tar" in str(error)
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="no whole tar"):
        Tars(tmp_path / "noise.tar")
    header = bytearray(tarfile.TarInfo("a.mp4").tobuf())
    header[124:136] = b"\xff" * 12  # a negative size, which would read the same header for ever
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header[:512])
    (tmp_path / "loop.tar").write_bytes(bytes(header) + bytes(2048))
    with pytest.raises(ValueError, match="no whole tar|no videos"):
        Tars(tmp_path / "loop.tar")
    with pytest.raises(FileNotFoundError, match="no such tar"):
        Tars(tmp_path / "nowhere.tar")
    with pytest.raises(ValueError, match="no .tar files"):
        Tars(_made(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_workers_read_what_the_main_process_reads(folder, tars, kind):
    videos = VideoFolder(folder, frames=5, size=16) if kind == "folder" else Tars(tars, frames=5, size=16)
    alone = [clip.video for clip in DataLoader(videos, batch_size=2, collate_fn=Clip.stack)]
    workers = DataLoader(videos, batch_size=2, collate_fn=Clip.stack, num_workers=1)
    for expected, clip in zip(alone, workers):
        assert torch.equal(expected, clip.video)
    assert torch.equal(pickle.loads(pickle.dumps(videos))[0].video, videos[0].video)


def test_errors_travel_between_processes():
    assert str(pickle.loads(pickle.dumps(VideoError("a.mp4: is empty")))) == "a.mp4: is empty"


def test_remembered_videos_give_the_same_clips(folder, monkeypatch):
    settings = {"frames": 5, "size": 32, "clips_per_video": 3, "random": ["start", "crop", "zoom", "flip"]}
    fresh, kept = VideoFolder(folder, **settings), VideoFolder(folder, **settings, remember=True)
    kept.get(3)  # all of this video is in memory from here on
    monkeypatch.setattr("reelm.data.decoding.Decoder._restarted", lambda *_: pytest.fail("decoded again"))
    again = [kept.get(index, draw=draw) for index in (3, 4, 5) for draw in (0, 1)]
    monkeypatch.undo()
    for clip, (index, draw) in zip(again, [(i, d) for i in (3, 4, 5) for d in (0, 1)]):
        assert torch.equal(clip.video, fresh.get(index, draw=draw).video)


def test_without_a_rate_the_stored_frames_are_taken(tmp_path):
    for name, fps in (("slow", 5.0), ("fast", 20.0)):
        write_video(tmp_path / f"{name}.mp4", ramp(-0.5).replace(fps=fps), quality=8)
    clips = [clip for clip in map(VideoFolder(tmp_path, frames=24, size=32, fps=None).get, (0, 1))]
    assert clips[0].fps == clips[1].fps  # so that they fit into one batch
    for clip in clips:
        steps = clip.video.mean((0, 1, 3, 4)).diff()
        assert (steps > 0.003).all() and steps.max() < 0.04  # none twice and none left out
    with pytest.raises(ValueError, match="sound has no one length"):
        VideoFolder(tmp_path, fps=None, audio=True)


def test_zoom_shows_less_of_the_picture_and_never_enlarges_a_pixel(tmp_path):
    across = torch.linspace(-1, 1, 96).expand(1, 3, 9, 64, 96)
    write_video(tmp_path / "ramp.mp4", Clip(across.contiguous(), fps=8.0), quality=8)
    videos = VideoFolder(tmp_path, frames=1, size=32, random=["crop", "zoom"])
    spans = []
    for draw in range(30):
        row = videos.get(0, draw=draw).video[0, 0, 0, 16]
        spans.append(float(row[-1] - row[0]))  # of the 2 that the whole ramp spans
    assert min(spans) >= 2 * 31 / 96 - 0.1 and max(spans) <= 2 * 64 / 96 + 0.1 and max(spans) > 1.5 * min(spans)


def test_symmetries_keep_what_is_shown(folder):
    plain = VideoFolder(folder, frames=5, size=32, random=[]).get(1).video
    made = [VideoFolder(folder, frames=5, size=32, random=["symmetry"]).get(1, draw=draw).video for draw in range(12)]
    assert len({tuple(video.mean((0, 1, 3, 4)).tolist()) for video in made}) > 1  # forwards and backwards
    for video in made:
        assert torch.allclose(video.flatten().sort().values, plain.flatten().sort().values)
    with pytest.raises(ValueError, match="sound does not bear"):
        VideoFolder(folder, random=["symmetry"], audio=True)
