"""Reading: time decides which frames, pictures stand upright, and nothing but a bounded local file is read."""

import io
import os
import struct
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from reelm.data.clip import Clip
from reelm.data.reading import Limits, VideoError, VideoReader, probe, read_image, read_video
from reelm.data.writing import write_image, write_video

BITS = 10
TICKS = 90_000


def clock_frame(number: int, size: int = 64) -> np.ndarray:
    """A picture that tells its number: one bar a binary digit."""
    frame = np.zeros((size, BITS * 8, 3), np.uint8)
    for bit in range(BITS):
        frame[:, bit * 8 : bit * 8 + 8] = 235 if number >> bit & 1 else 20
    return frame


def clock_numbers(clip: Clip) -> list[int]:
    """The numbers that the frames of a clip of native size tell."""
    bars = clip.video[0].mean(0).unflatten(-1, (BITS, -1)).mean((1, 3)) > 0
    return [sum(int(bar) << bit for bit, bar in enumerate(row)) for row in bars]


def write_clock(path: Path, times: list[float], codec: str = "libx264", gop: int = 12, **options) -> Path:
    """A file whose frame i, which tells i, is shown at times[i] seconds."""
    with av.open(str(path), "w", **options) as out:
        stream = out.add_stream(codec, rate=30, options={"g": str(gop)} if codec != "gif" else {})
        stream.width, stream.height = BITS * 8, 64
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 100 if codec == "gif" else TICKS)
        for number, moment in enumerate(times):
            frame = av.VideoFrame.from_ndarray(clock_frame(number), format="rgb24").reformat(format=stream.pix_fmt)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(moment / frame.time_base)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def constant(fps: float, seconds: float = 4.0) -> list[float]:
    return [i / fps for i in range(int(seconds * fps))]


def changing(seconds: float = 4.0) -> list[float]:
    """Gaps from a 60th to a 10th of a second in no order."""
    gaps = np.random.default_rng(0).uniform(1 / 60, 1 / 10, 400)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    return times[times < seconds].tolist()


RATES = {
    "23.976": constant(24000 / 1001), "25": constant(25), "29.97": constant(30000 / 1001), "60": constant(60),
    "changing": changing(),
}  # fmt: skip


@pytest.mark.parametrize("container", ["mp4", "mkv", "mov", "ts"])
@pytest.mark.parametrize("rate", RATES)
def test_time_decides_which_frame_is_shown(tmp_path, rate, container):
    times = RATES[rate]
    path = write_clock(tmp_path / f"clock.{container}", times)
    for start in (0.0, 0.71):
        numbers = clock_numbers(read_video(path, fps=8, frames=17, size=None, start=start))
        for i, number in enumerate(numbers):
            wanted = start + i / 8
            around = times[max(number - 1, 0) : number + 2]
            half = max(b - a for a, b in zip(around, around[1:])) / 2
            assert abs(times[number] - wanted) <= half + 0.002, f"frame {i}: {times[number]} for {wanted}"
            assert abs(times[number] - wanted) <= min(abs(other - wanted) for other in times) + 0.002


def test_every_frame_comes_once_without_a_rate(tmp_path):
    for rate in ("29.97", "changing"):
        times = RATES[rate]
        clip = read_video(write_clock(tmp_path / "clock.mp4", times), fps=None, frames=None, size=None)
        assert clock_numbers(clip) == list(range(len(times)))
        assert clip.fps == pytest.approx(len(times) / 4, rel=0.15 if rate == "changing" else 0.01)
    clip = read_video(tmp_path / "clock.mp4", fps=None, frames=3, size=None, start=times[20])
    assert clock_numbers(clip) == [20, 21, 22]


def test_a_picture_that_stands_long_stays_until_the_next(tmp_path):
    path = write_clock(tmp_path / "slides.mp4", [0.0, 0.1, 3.0, 3.1, 3.2])
    numbers = clock_numbers(read_video(path, fps=8, frames=25, size=None))
    assert numbers[:2] == [0, 1] and numbers[2:24] == [1] * 22 and numbers[24] == 2


@pytest.mark.parametrize("container", ["mp4", "mkv", "webm", "avi", "ts", "flv"])
def test_seeking_gives_what_reading_on_gives(tmp_path, container):
    codec = "libvpx-vp9" if container == "webm" else "libx264"
    path = write_clock(tmp_path / f"long.{container}", constant(30, 12), codec, gop=50)
    whole = clock_numbers(read_video(path, fps=8, frames=None, size=None))
    assert 94 <= len(whole) <= 97 and whole == sorted(whole)
    for start in (2.5, 6.0, 10.0):
        numbers = clock_numbers(read_video(path, fps=8, frames=9, size=None, start=start))
        assert numbers == whole[round(start * 8) : round(start * 8) + 9]
    with VideoReader(path) as reader:  # one file, several reads, in any order
        for start in (6.0, 0.0, 3.0):
            again = clock_numbers(reader.read(fps=8, frames=3, size=None, start=start))
            assert again == whole[round(start * 8) : round(start * 8) + 3]
    assert probe(path).duration == pytest.approx(12, abs=0.05) and probe(path).fps == pytest.approx(30, rel=0.01)


def test_a_seek_near_the_end_decodes_little(tmp_path):
    path = write_clock(tmp_path / "long.mp4", constant(30, 30), gop=30)
    with VideoReader(path) as reader:
        reader.read(frames=1, size=None, start=28.0)
        assert reader.decoder.decoded < 100


def test_times_that_start_elsewhere_count_from_the_first_frame(tmp_path):
    times = constant(10, 3)
    for shift, name in ((5.0, "shifted.mkv"), (-0.5, "shifted.ts")):
        path = write_clock(tmp_path / name, [t + shift for t in times])
        assert clock_numbers(read_video(path, fps=10, frames=9, size=None)) == list(range(9))


def test_gif_times(tmp_path):
    path = write_clock(tmp_path / "a.gif", [0, 0.1, 0.5, 0.6, 0.7], "gif")
    assert clock_numbers(read_video(path, fps=10, frames=7, size=None)) == [0, 1, 1, 1, 1, 2, 3]


def test_raw_streams_go_by_their_rate(tmp_path):
    path = write_clock(tmp_path / "a.264", constant(25, 2), format="h264")
    numbers = clock_numbers(read_video(path, fps=5, frames=6, size=None))
    assert numbers[0] == 0 and numbers == sorted(numbers)
    rate = probe(path).fps
    assert [round(n / rate * 5) for n in numbers] == list(range(6))


def test_a_clip_that_is_too_short(tmp_path):
    path = write_clock(tmp_path / "short.mp4", constant(10, 1))
    message = r"short.mp4: has 8 frames at 8 fps from 0 s on, 17 were asked: lower frames or raise fps$"
    with pytest.raises(VideoError, match=message):
        read_video(path)
    numbers = clock_numbers(read_video(path, size=None, short="repeat"))
    assert len(numbers) == 17 and set(numbers[8:]) == {numbers[7]}
    with pytest.raises(VideoError, match="ends before start=5 s"):
        read_video(path, start=5.0)
    assert read_video(path, frames=None).frames == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps=0"), ({"fps": float("nan")}, "fps=nan"), ({"frames": 0}, "frames=0"),
        ({"start": -1}, "start=-1"), ({"short": "loop"}, "short='loop'"), ({"crop_at": (2, 0)}, "crop_at"),
        ({"size": 0}, "size=0"), ({"size": (3, 4, 5)}, "size="), ({"fit": "squash"}, "fit='squash'"),
        ({"fit": "none", "size": (4, 4)}, "one number"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(tmp_path, options, message):
    path = write_clock(tmp_path / "a.mp4", constant(10, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read_video(path, **options)
    assert "\n" not in str(caught.value)


# shape


def quarters(height: int = 96, width: int = 160) -> Clip:
    """Red, green / blue, white quarters."""
    video = torch.full((1, 3, 1, height, width), -1.0)
    video[:, 0, :, : height // 2, : width // 2] = 1
    video[:, 1, :, : height // 2, width // 2 :] = 1
    video[:, 2, :, height // 2 :, : width // 2] = 1
    video[:, :, :, height // 2 :, width // 2 :] = 1
    return Clip(video)


def corners(clip: Clip) -> str:
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w", (0, 0, 0): "k"}
    picture = clip.video[0, :, 0]
    places = ((0, 0), (0, -1), (-1, 0), (-1, -1))
    found = (picture[:, y * 4 if y else 3, x * 4 if x else 3] > 0 for y, x in places)
    return "".join(names[tuple(colour.int().tolist())] for colour in found)


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The same mp4 whose track header asks to be shown through another matrix (a, b, c, d)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", data, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (65536 * value for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned = path.with_name("turned.mp4")
    turned.write_bytes(data)
    return turned


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), "rgbw"), ((0, 1, -1, 0), "brwg"), ((-1, 0, 0, -1), "wbgr"), ((0, -1, 1, 0), "gwrb"),
        ((-1, 0, 0, 1), "grwb"), ((1, 0, 0, -1), "bwrg"), ((0, 1, 1, 0), "rbgw"), ((0, -1, -1, 0), "wgbr"),
        ((0, 0, 0, 0), "rgbw"),
    ],
)  # fmt: skip
def test_rotation_and_mirroring_are_applied(tmp_path, matrix, expected):
    path = with_matrix(write_video(tmp_path / "a.mp4", quarters()), matrix)
    native = read_video(path, frames=1, size=None)
    sideways = matrix[0] == 0 and matrix[1] != 0
    assert native.size == ((160, 96) if sideways else (96, 160)) == probe(path).size
    assert corners(native) == expected
    assert corners(read_video(path, frames=1, size=(64, 64))) == expected


def test_crop_pad_and_none(tmp_path):
    path = write_video(tmp_path / "a.mp4", quarters(64, 128))
    assert read_video(path, frames=1, size=32).size == (32, 32)
    assert corners(read_video(path, frames=1, size=32, crop_at=(0.5, 0.0))) == "rrbb"
    assert corners(read_video(path, frames=1, size=32, crop_at=(0.5, 1.0))) == "ggww"
    padded = read_video(path, frames=1, size=32, fit="pad").video[0, :, 0]
    assert padded[:, :7].max() == padded[:, -7:].max() == -1 and padded[:, 10:22].max() > 0.9
    assert read_video(path, frames=1, size=48, fit="none").size == (48, 96)
    assert read_video(path, frames=1, size=(20, 50)).size == (20, 50)
    assert read_video(path, frames=1, size=200).size == (200, 200)


def test_the_shape_of_pixels_counts_when_sizes_are_given(tmp_path):
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    assert probe(path).pixel_aspect == 2 and probe(path).size == (64, 64)
    assert read_video(path, frames=1, size=None).size == (64, 64)
    assert read_video(path, frames=1, size=32, fit="none").size == (32, 64)


def test_shrinking_does_not_alias(tmp_path):
    stripes = torch.ones(1, 3, 1, 512, 512)
    stripes[..., ::2] = -1
    write_image(tmp_path / "stripes.png", Clip(stripes))
    assert read_image(tmp_path / "stripes.png", size=64).video.abs().max() < 0.15


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuvj420p", "yuv420p10le", "gray"])
def test_pixel_formats_keep_their_colours(tmp_path, pixel_format):
    path = tmp_path / "a.mkv"
    colour = np.array([200, 60, 120]) if pixel_format != "gray" else np.array([90, 90, 90])
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264" if pixel_format != "gray" else "ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (48, 64, 3)).astype(np.uint8), format="rgb24")
        for number in range(3):
            frame.pts = number
            out.mux(stream.encode(frame.reformat(format=pixel_format)))
        out.mux(stream.encode(None))
    found = (read_video(path, frames=1, size=None).video[0, :, 0, 24, 32] + 1) * 127.5
    assert (found - torch.from_numpy(colour)).abs().max() < 6


# pictures


def test_pictures_are_clips_of_one_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for name in ("a.png", "a.webp", "a.bmp", "a.tiff"):
        Image.fromarray(pixels).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        clip = read_image(tmp_path / name, size=None)
        assert np.array_equal(((clip.video[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), pixels), name
        assert probe(tmp_path / name).size == (50, 70) and probe(tmp_path / name).frames == 1
    with pytest.raises(VideoError, match="is a still image, 17 were asked"):
        read_video(tmp_path / "a.png")
    assert read_video(tmp_path / "a.png", short="repeat").frames == 17
    assert read_video(tmp_path / "a.png", short="shorter").frames == 1
    assert read_video((tmp_path / "a.png").read_bytes(), frames=1, size=16).size == (16, 16)


def test_pictures_turn_as_the_camera_was_held(tmp_path):
    picture = Image.fromarray(((quarters().video[0, :, 0] + 1) * 127.5).byte().permute(1, 2, 0).numpy())
    for orientation, expected in ((1, "rgbw"), (6, "brwg"), (8, "gwrb"), (2, "grwb")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
        assert corners(read_image(tmp_path / "a.jpg", size=None)) == expected


def test_transparent_pixels_stand_on_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 255)).save(tmp_path / "red.png")
    Image.new("RGB", (20, 20), (9, 9, 9)).quantize(2).save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "clear.png").video.min() > 0.99
    assert read_image(tmp_path / "palette.png").video.min() > 0.99
    assert read_image(tmp_path / "red.png").video[0, :, 0, 3, 3].tolist() == pytest.approx([1, -1, -1])


def test_animated_webp_has_times(tmp_path):
    frames = [Image.fromarray(clock_frame(number)) for number in range(4)]
    options = {"save_all": True, "append_images": frames[1:], "duration": [100, 300, 100, 100], "lossless": True}
    frames[0].save(tmp_path / "a.webp", **options)
    assert clock_numbers(read_video(tmp_path / "a.webp", fps=10, frames=6, size=None)) == [0, 1, 1, 1, 2, 3]
    assert probe(tmp_path / "a.webp").duration == pytest.approx(0.6)


# sources and limits


def test_bytes_and_files_read_like_paths(tmp_path):
    path = write_clock(tmp_path / "a.mp4", constant(30, 5))
    expected = read_video(path, start=2.5).video
    assert torch.equal(read_video(path.read_bytes(), start=2.5).video, expected)
    with open(path, "rb") as file:
        clip = read_video(file, start=2.5)
        assert torch.equal(clip.video, expected) and clip.keys == (str(path),)
    assert torch.equal(read_video(io.BytesIO(path.read_bytes()), start=2.5).video, expected)


def test_strange_names_are_just_names(tmp_path, monkeypatch):
    source = write_clock(tmp_path / "a.mp4", constant(10, 1)).read_bytes()
    for name in ("-dash-.mp4", "a:b.mp4", "50%d.mp4", "concat:x|y", "naïve 夏 .mp4", "bare", "wrong.txt", "a\nb.mp4"):
        (tmp_path / name).write_bytes(source)
        assert read_video(tmp_path / name, frames=2).frames == 2
    monkeypatch.chdir(tmp_path)
    assert read_video("-dash-.mp4", frames=2).frames == 2


def test_only_local_files_are_opened(tmp_path):
    media = write_clock(tmp_path / "secret.ts", constant(10, 1))
    lists = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{media}\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile '{media}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "mpd": f'<?xml version="1.0"?><MPD><Period><BaseURL>{media}</BaseURL></Period></MPD>',
    }
    for kind, text in lists.items():
        for name in (f"a.{kind}", "a.mp4"):
            (tmp_path / name).write_text(text)
            with pytest.raises(VideoError, match="not in a format|is damaged"):
                read_video(tmp_path / name, frames=1)
        with pytest.raises(VideoError):
            read_video(text.encode(), frames=1)
    for link in (
        "http://127.0.0.1:1/a.mp4",
        "pipe:0",
        f"concat:{media}|{media}",
        f"file:{media}",
        "rtsp://x/y",
        "a\0b",
    ):
        with pytest.raises(VideoError, match="not a local file|does not exist"):
            read_video(link, frames=1)


def test_what_is_no_video_says_what_it_is(tmp_path):
    noise = np.random.default_rng(0).bytes(4000)
    cases = {"empty.mp4": (b"", "is empty"), "noise.mp4": (noise, ""), "text.mp4": (b"hello " * 99, "")}
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=f"{name}: .*{message}") as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(VideoError, match="does not exist"):
        read_video(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoError, match="VideoFolder"):
        read_video(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a regular file"):
        read_video(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="is damaged|cannot be read"):
        read_video(b"\x89PNG\r\n\x1a\n" + bytes(50), frames=1)


def test_limits_hold_before_and_while_decoding(tmp_path):
    path = write_clock(tmp_path / "a.mp4", constant(30, 4))
    for limits, message in (
        (Limits(pixels=1000), "80 x 64.*limits.pixels|pixels"), (Limits(frames=20), "limits.frames"),
        (Limits(seconds=0.0), "limits.seconds"), (Limits(memory=100_000), "smaller size"),
    ):  # fmt: skip
        with pytest.raises(VideoError, match=message):
            read_video(path, limits=limits)
    for pixels in ((9000, 9000), (65_500, 2)):
        Image.new("L", pixels).save(tmp_path / "big.png")
        with pytest.raises(VideoError, match="pixels"):
            read_image(tmp_path / "big.png", size=2000, limits=Limits(pixels=1_000_000))
    with pytest.raises(VideoError, match="bytes"):
        read_image(tmp_path / "big.png", limits=Limits(bytes=10))


def test_damaged_and_cut_files_end_well(tmp_path):
    """Every one of some dozens of seeded flips and cuts gives a clip or one line, in bounded time."""
    whole = write_clock(tmp_path / "whole.mp4", constant(30, 2)).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = []
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            first = 0 if trial % 3 == 1 else len(whole) - 2500  # the header stands last in this file
            for at in rng.integers(first, len(data), int(rng.integers(1, 20))):
                data[at] ^= 1 << int(rng.integers(8))
        began = time.process_time()
        try:
            clip = read_video(bytes(data), frames=9, size=32, limits=Limits(memory=1 << 28))
            assert clip.video.shape == (1, 3, 9, 32, 32) and torch.isfinite(clip.video).all()
            outcomes.append(True)
        except VideoError as error:
            assert "\n" not in str(error) and str(error).startswith("<bytes>: ")
            outcomes.append(False)
        assert time.process_time() - began < 5
    assert 5 < sum(outcomes) < 55


# sound


def beeping(seconds: float, rate: int, channels: int = 2, every: float = 0.5) -> torch.Tensor:
    """A click of 10 ms at each multiple of `every`."""
    times = torch.arange(int(seconds * rate)) / rate
    wave = torch.sin(2 * torch.pi * 1000 * times) * ((times % every) < 0.01)
    return wave.expand(1, channels, -1).clone()


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
@pytest.mark.parametrize("start", [0.0, 1.25, 3.5])
def test_sound_keeps_step_with_the_frames(tmp_path, name, start):
    seconds, rate = 6.0, 24_000
    video = torch.zeros(1, 3, 48, 32, 32)
    path = write_video(tmp_path / name, Clip(video, fps=8.0, audio=beeping(seconds, rate), audio_rate=rate))
    clip = read_video(path, frames=16, start=start, audio=True, audio_rate=16_000)
    assert clip.audio.shape == (1, 2, 32_000) and clip.audio_rate == 16_000
    loud = (clip.audio[0, 0].abs() > 0.25).nonzero().flatten() / 16_000 + start
    assert len(loud) > 100
    off = (loud + 0.1) % 0.5 - 0.1  # from the nearest click
    assert off.min() > -0.006 and off.max() < 0.016
    mono = read_video(path, frames=16, start=start, audio=True, audio_channels=1)
    assert mono.audio.shape == (1, 1, 32_000) and mono.audio.abs().max() > 0.25


def test_missing_sound_is_silence_or_none(tmp_path):
    video = torch.zeros(1, 3, 16, 32, 32)
    half = write_video(tmp_path / "half.mp4", Clip(video, fps=8.0, audio=beeping(1.0, 16_000), audio_rate=16_000))
    wave = read_video(half, frames=16, audio=True).audio
    assert wave.shape[-1] == 32_000 and wave[..., :16_000].abs().max() > 0.25 and wave[..., 18_000:].abs().max() < 1e-3
    mute = write_video(tmp_path / "mute.mp4", Clip(video, fps=8.0))
    assert read_video(mute, frames=16, audio=True).audio is None
    assert probe(half).has_audio and not probe(mute).has_audio
