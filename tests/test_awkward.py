"""Files as the world makes them: every awkward one reads as it is shown, or says in one line why it does not."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.folder import VideoFolder
from reelm.data.reading import Limits, VideoError, VideoInfo, probe, read_image, read_video

SHARED = Path(__file__).parents[2] / "shared"
AWKWARD, NATURAL = SHARED / "clips" / "awkward", SHARED / "clips" / "natural"
LIMITS = Limits(seconds=120)  # bounded, with room for a busy machine
pytestmark = pytest.mark.skipif(not AWKWARD.is_dir(), reason="the collection of awkward files is not here")

# name: (height, width as shown), frames a second, seconds, frames that can be decoded
READ = {
    "androidx_media_bbb_176x144_128kbps_15fps_h263.3gp": ((144, 176), 15, 1.0, 15),
    "androidx_media_bear_vp9_odd_dimensions.webm": ((121, 161), 29.97, 1.001, 30),
    "androidx_media_edit_list_positive_shift.mp4": ((1080, 1920), 30, 9.0, 270),
    "androidx_media_iibbibb_editlist_videoonly.mp4": ((576, 704), 1, 12.5, 12),
    "androidx_media_midroll_5s.mp4": ((360, 640), 25, 5.0, 125),
    "androidx_media_sample.flv": ((720, 1080), 29.99, 1.0, 30),
    "androidx_media_sample.mkv": ((720, 1080), 29.99, 1.0, 30),
    "androidx_media_sample_android_slow_motion.mp4": ((720, 1280), 13.32, 0.525, 7),
    "androidx_media_sample_empty_track.mp4": ((720, 1080), 29.97, 0.968, 30),
    "androidx_media_sample_fragmented.mp4": ((720, 1080), 29.97, 1.001, 30),
    "androidx_media_sample_h262_mpeg_audio.ts": ((426, 640), 29.97, 0.1, 3),
    "androidx_media_sample_mdat_too_long.mp4": ((720, 1080), 29.97, 1.001, 30),
    "androidx_media_sample_missing_stsd.mp4": ((720, 1080), 29.97, 1.001, 30),
    "androidx_media_sample_portrait.mp4": ((1080, 720), 29.97, 1.001, 30),
    "androidx_media_sample_rotate_and_reflect.mp4": ((1080, 720), 29.97, 1.001, 30),
    "androidx_media_sample_sef_super_slow_motion.mp4": ((120, 160), 30, 14.5, 435),
    "androidx_media_sample_vvc.mp4": ((180, 320), 24, 5.0, 120),
    "androidx_media_sample_with_large_length.avi": ((144, 256), 30, 1.967, 58),
    "androidx_media_testvid_1022ms.mp4": ((360, 480), 29.917, 1.003, 30),
    "decord_unordered.mov": ((50, 50), 32, 0.125, 4),
    "decord_video_0.mov": ((320, 568), 30, 0.1, 3),
    "decord_video_90.mov": ((568, 320), 30, 0.1, 3),
    "decord_video_180.mov": ((320, 568), 30, 0.1, 3),
    "decord_video_270.mov": ((568, 320), 30, 0.1, 3),
    "mmaction2_part_0.mp4": ((256, 340), 30, 1.067, 32),
    "moviepy__video_with_dash_.mp4": ((1, 1), 1, 5.0, 5),
    "moviepy_bitmap.mp4": ((1, 1), 1, 5.0, 5),
    "moviepy_no_duration.webm": ((720, 1280), 14.985, 4.938, 74),
    "moviepy_transparent.webm": ((200, 200), 30, 5.0, 150),
    "openh264_BA_MW_D_P_LOST.264": ((144, 176), 25, 3.96, 99),
    "openh264_Error_I_P.264": ((288, 352), 25, 0.24, 6),
    "torchcodec_av1_video.mkv": ((360, 640), 25, 5.0, 125),
    "torchcodec_h265_10bits.mp4": ((200, 200), 30, 1.0, 30),
    "videocomposer_video_5360763.mp4": ((360, 640), 16, 5.375, 86),
}
PARTLY = {"decord_corrupted.mp4": 28, "androidx_media_sample_with_invalid_nalu.mp4": 26}  # frames before they break
HEADER_LASTS_LONGER = {"androidx_media_iibbibb_editlist_videoonly.mp4"}  # half a second beyond its last frame
REFUSED = {
    "androidx_media_invalid_bitstream.webm": "is damaged or no video",
    "androidx_media_sample_audio_only.mp4": "holds no video, only audio",
    "androidx_media_sample_malformed_free_box.mp4": "is damaged or no video",
}


def read(name: str, **options) -> Clip:
    return read_video(AWKWARD / name, limits=LIMITS, **options)


def info(name: str) -> VideoInfo:
    return probe(AWKWARD / name, limits=LIMITS)


def test_every_file_of_the_collection_is_expected():
    assert {path.name for path in AWKWARD.iterdir()} == {*READ, *PARTLY, *REFUSED}


@pytest.mark.parametrize("name", READ)
def test_it_reads_as_it_is_shown(name):
    size, fps, seconds, count = READ[name]
    found = info(name)
    assert found.size == size
    assert found.fps == pytest.approx(fps, rel=2e-3) and found.duration == pytest.approx(seconds, abs=0.04)
    few = min(count, 12)
    native = read(name, fps=None, frames=few, size=None)
    assert native.video.shape == (1, 3, few, *size) and native.fps == found.fps
    if count <= 150:
        assert read(name, fps=None, frames=None, size=16).frames == count
    whole = read(name, frames=None, size=24)
    assert abs(whole.frames - seconds * 8) <= 1.3 + (4 if name in HEADER_LASTS_LONGER else 0)
    assert torch.isfinite(whole.video).all() and whole.video.abs().max() <= 1


@pytest.mark.parametrize("name", [name for name in READ if not name.endswith((".264", ".avi"))])
def test_its_frames_come_at_their_times(name):
    count = min(READ[name][3], 25)
    with av.open(str(AWKWARD / name), metadata_errors="ignore") as container:
        times = []
        for frame in container.decode(container.streams.best("video")):
            times.append(frame.time)
            if len(times) == count:
                break
    times = np.array(times) - times[0]
    options = {"size": 48, "fit": "pad"}
    each = read(name, fps=None, frames=count, **options).video
    rate = 7.3
    wanted = np.arange(max(1, int(times[-1] * rate))) / rate
    nearest = [int(np.abs(times - moment).argmin()) for moment in wanted]
    if np.diff(times).max(initial=0) < 1 / rate:
        assert torch.equal(read(name, fps=rate, frames=len(wanted), **options).video, each[:, :, nearest])


@pytest.mark.parametrize("name", PARTLY)
def test_what_breaks_on_the_way_gives_the_part_before(name):
    clip = read(name, frames=5, size=32)
    assert clip.video.std() > 0.1
    assert read(name, fps=None, frames=PARTLY[name], size=32).frames == PARTLY[name]
    for options in ({"frames": None}, {"fps": None, "frames": 50}, {"start": 4.0, "frames": 1}):
        with pytest.raises(VideoError, match=f"{name}: .*is damaged|ends before") as caught:
            read(name, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name):
    for attempt in (info, read):
        with pytest.raises(VideoError, match=f"{name}: {REFUSED[name]}") as caught:
            attempt(name)
        assert "\n" not in str(caught.value)


def test_mirrored_and_turned_is_undone():
    """Two files of one recording, one of them with a matrix that swaps rows and columns."""
    straight = read("androidx_media_sample_mdat_too_long.mp4", fps=None, frames=2, size=None)
    swapped = read("androidx_media_sample_rotate_and_reflect.mp4", fps=None, frames=2, size=None)
    assert torch.equal(swapped.video.transpose(-1, -2), straight.video)


def test_edges_of_a_clip_that_was_turned_stay_in_place():
    """The keyboard's plain hand rest is below its keys, however the camera was held."""
    for angle in (0, 90):
        picture = read(f"decord_video_{angle}.mov", frames=1, size=None).video[0, :, 0].mean(0)
        detail = (picture[1:] - picture[:-1]).abs().mean(1)
        third = len(detail) // 3
        assert detail[:third].mean() > detail[-third:].mean()


def test_transparency_shows_white():
    clip = read("moviepy_transparent.webm", size=None, start=1.6, frames=1).video[0, :, 0]
    assert clip[:, :5, :5].min() > 0.97  # black where transparency is ignored
    assert ((clip[0] > 0.8) & (clip[1] < -0.8)).any()  # the red ball


def test_published_frames_are_equal():
    published = np.load(SHARED / "reference_frames" / "torchcodec_frames.npz")
    assert len(published.files) == 3
    for key in published.files:
        name, number = key.split("#")
        clip = read_video(SHARED / "reference_frames" / name, fps=None, frames=int(number) + 1, size=None)
        pixels = ((clip.video[0, :, -1] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, published[key])


def test_a_run_over_the_collection_goes_on():
    videos = VideoFolder(AWKWARD, frames=9, size=16, audio=True)
    with pytest.warns(UserWarning, match="left out"):
        keys = [videos[index].keys[0] for index in range(0, len(videos), 4)]
    assert set(keys) <= set(READ) | set(PARTLY) and videos.failures


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NATURAL.glob("*.mp4")), ids=lambda path: path.stem)
def test_natural_clips_read(path):
    clip = read_video(path, frames=9, size=64, start=0.2)
    assert clip.video.shape == (1, 3, 9, 64, 64) and clip.video.std() > 0.05
    late = probe(path).duration - 1.2
    assert read_video(path, frames=9, size=64, start=late).video.shape == (1, 3, 9, 64, 64)


def test_pictures_read():
    for path in sorted((SHARED / "images").glob("*.png")):
        assert read_image(path, size=(40, 64)).video.std() > 0.05
