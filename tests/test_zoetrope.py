"""The built-in world: same seed same clip, truthful truth, captions that can be read back, sound that follows."""

import pickle

import numpy as np
import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.zoetrope.captions import Attributes, caption, parse
from reelm.data.zoetrope.dataset import RATE, Zoetrope
from reelm.data.zoetrope.render import render
from reelm.data.zoetrope.scene import (
    HELD_OUT,
    MOTIONS,
    SHAPES,
    SPLITS,
    STYLES,
    Object,
    Scene,
    bounce_times,
    poses,
    sample_scene,
)
from reelm.data.zoetrope.sound import PITCHES, sound
from reelm.data.zoetrope.truth import FIELDS, truth


def test_a_scene_follows_from_its_numbers_alone():
    first = sample_scene(3, "train", 17)
    sample_scene.cache_clear()
    assert sample_scene(3, "train", 17) == first
    different = {sample_scene(*numbers) for numbers in ((3, "train", 18), (4, "train", 17), (3, "validation", 17))}
    assert len(different | {sample_scene(3, "train", 17)}) == 4


def test_the_share_of_scenes_with_one_object_is_chosen():
    counts = [[len(sample_scene(0, "train", i, one_object=share).objects) for i in range(400)] for share in (0.0, 0.45)]
    assert counts[0].count(1) < 24 and counts[0].count(2) > 1.05 * counts[0].count(3)  # not every crowd fits
    assert 0.38 < counts[1].count(1) / 400 < 0.52
    assert len(sample_scene(0, "train", 3, still=True, one_object=1.0).objects) == 1
    alone = Zoetrope(one_object=1.0)
    assert {len(alone.scene(i, frames).objects) for i in range(30) for frames in (1, 17)} == {1}


def test_held_out_triples_only_occur_in_the_compositional_split():
    assert 0.06 < len(HELD_OUT) / (len(SHAPES) * 8 * len(MOTIONS)) < 0.1
    for still in (False, True):
        for split in SPLITS:
            for i in range(150):
                scene = sample_scene(1, split, i, still=still)
                held_out = any(thing.triple in HELD_OUT for thing in scene.objects)
                assert held_out == (split == "compositional")
                assert not still or (scene.camera == "static" and {o.motion for o in scene.objects} == {"still"})


def test_objects_stay_in_the_frame_and_apart():
    for i in range(150):
        scene = sample_scene(2, "train", i)
        place = poses(scene, np.arange(17) / 8)
        for x, y, radius in zip(place.x, place.y, place.radius, strict=True):
            assert (np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) > 0.85 * radius).all()
        for a in range(len(scene.objects)):
            for b in range(a):
                apart = np.hypot(place.x[a] - place.x[b], place.y[a] - place.y[b])
                assert (apart > place.radius[a] + place.radius[b]).all()
        assert len({thing.colour for thing in scene.objects}) == len(scene.objects)


def test_a_short_quick_clip_still_gives_a_scene():
    for i in range(60):
        scene = sample_scene(0, "train", i, seconds=0.1)
        assert 1 <= len(scene.objects) <= 3
        assert render(scene, 5, 32, fps=50).shape == (5, 32, 32, 3)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [64, (48, 80), (81, 50)])
def test_rendering_takes_any_size_and_length(style, size):
    scene = sample_scene(0, "train", 3)
    pixels = render(scene, 5, size, fps=4.0, style=style)
    height, width = (size, size) if isinstance(size, int) else size
    assert pixels.shape == (5, height, width, 3) and pixels.dtype == np.uint8
    assert (pixels == render(scene, 5, size, fps=4.0, style=style)).all()


def test_the_rate_only_chooses_moments():
    scene = sample_scene(0, "train", 5)
    assert (render(scene, 17, 32, fps=8.0)[::2] == render(scene, 9, 32, fps=4.0)).all()


def test_edges_are_anti_aliased():
    """A frame is close to a much larger one averaged down, which a hard-edged frame would not be."""
    for shape in SHAPES:
        scene = Scene((Object(shape, "white", "large", "spin", 0.5, 0.5, rate=0.05),))
        small = render(scene, 1, 64, fps=8)[0].astype(float)
        large = render(scene, 1, 512, fps=8)[0].astype(float).reshape(64, 8, 64, 8, 3).mean((1, 3))
        assert np.abs(small - large).mean() < 0.6
        assert np.abs(small - large).max() < 90


def test_styles_share_geometry():
    for i in range(12):
        scene = sample_scene(6, "train", i)
        masks = _dilated(truth(scene, 5, 64, fps=2.0, fields=("masks",))["masks"].any(0), 9)
        pictures = {style: render(scene, 5, 64, fps=2.0, style=style).astype(int) for style in STYLES}
        assert all((pictures[a] != pictures[b]).any() for a in STYLES for b in STYLES if a != b)
        for style in ("flat", "outline"):  # outside of the objects these two are the same picture
            assert (pictures[style][~masks] == pictures["flat"][~masks]).all()
        chroma = {style: np.ptp(picture, axis=-1) > 100 for style, picture in pictures.items()}
        for style, vivid in chroma.items():
            assert not (vivid & ~masks).any(), style


def test_flow_carries_each_object_to_the_next_frame():
    checked = 0
    for i in range(40):
        scene = sample_scene(8, "train", i)
        known = truth(scene)
        pixels = render(scene, style="flat").astype(np.float64)
        for t in (0, 7, 15):
            for mask in (*known["masks"], ~_dilated(known["masks"].any(0), 3)):
                here = np.argwhere(_eroded(mask, 2)[t])
                there = here[:, ::-1] + known["flow"][t][here[:, 0], here[:, 1]]
                low = np.floor(there).astype(int)
                near = [low + (dx, dy) for dx in (0, 1) for dy in (0, 1)]
                good = np.all([(p >= 0).all(1) & (p < 64).all(1) for p in near], 0)
                good[good] &= np.all([_eroded(mask, 1)[t + 1][p[good, 1], p[good, 0]] for p in near], 0)
                here, low, part = here[good], low[good], (there - low)[good]
                warped = sum(
                    pixels[t + 1, low[:, 1] + dy, low[:, 0] + dx]
                    * (np.where(dx, part[:, :1], 1 - part[:, :1]) * np.where(dy, part[:, 1:], 1 - part[:, 1:]))
                    for dx in (0, 1)
                    for dy in (0, 1)
                )
                if len(here):
                    assert np.abs(warped - pixels[t, here[:, 0], here[:, 1]]).mean() < 2.5
                    checked += 1
    assert checked > 150


def test_boxes_tracks_and_depth_agree_with_the_masks():
    for i in range(20):
        scene = sample_scene(9, "train", i)
        known = truth(scene, 9, (48, 64), fps=4.0)
        assert set(known) == set(FIELDS)
        for mask, boxes, track, thing in zip(
            known["masks"], known["boxes"], known["tracks"], scene.objects, strict=True
        ):
            for t in range(9):
                if not mask[t].any():
                    assert not boxes[t].any()
                    continue
                rows, columns = np.nonzero(mask[t])
                assert boxes[t].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert boxes[t][0] <= track[t][0] <= boxes[t][2] and boxes[t][1] <= track[t][1] <= boxes[t][3]
                assert track[t][2] == 1
            assert np.allclose(known["depth"][mask], thing.depth)
        assert (known["depth"][~known["masks"].any(0)] == 0).all()
        assert known["masks"].sum(0).max() <= 1


def test_camera_matrices_place_still_objects():
    scene = Scene((Object("star", "red", "small", "still", 0.4, 0.6),), background="stars", camera="zoom in")
    known = truth(scene, 9, 64)
    screen = known["camera"] @ np.array([0.4, 0.6, 0.7, 1.0])
    assert np.allclose(screen[:, :2] * 64, known["tracks"][0, :, :2], atol=1e-3)


def test_one_frame_has_no_flow_and_unknown_truths_are_refused():
    assert not truth(sample_scene(0, "train", 0, still=True), 1)["flow"].any()
    with pytest.raises(ValueError, match="unknown truth 'color'"):
        truth(sample_scene(0, "train", 0), fields=("color",))


def test_captions_can_be_read_back():
    for i in range(300):
        scene = sample_scene(4, "train", i)
        told = parse(caption(scene, i, full=True))
        expected = Attributes.of(scene)
        assert told.objects == expected.objects and told.background == scene.background and told.style == scene.style
        assert told.camera == (None if scene.camera == "static" else scene.camera)
        short = parse(caption(scene, i, full=False))
        assert [(o.shape, o.colour, o.motion) for o in short.objects] == [
            (o.shape, o.colour, o.motion) for o in scene.objects
        ]
        assert (short.style, short.camera, short.background) == (None, None, None)
        still = sample_scene(4, "train", i, still=True)
        image = parse(caption(still, i, full=True, image=True))
        assert image.objects == Attributes.of(still, image=True).objects and image.camera is None


def test_free_prompts_are_read():
    told = parse("A red STAR moves left while a blue circle bounces")
    assert [(o.colour, o.shape, o.motion) for o in told.objects] == [
        ("red", "star", "left"),
        ("blue", "circle", "bounce"),
    ]
    assert parse("in neon style") == Attributes(style="neon")
    assert parse("a dog on the beach") == Attributes()


def test_sound_has_the_pitch_of_the_shape_and_the_side_of_the_object():
    for shape, x, side in (("circle", 0.1, 0), ("heart", 0.9, 1)):
        heard = sound(Scene((Object(shape, "red", "large", "still", x, 0.5),)), 1.0, RATE)
        assert heard.shape == (2, RATE) and heard.dtype == np.float32 and np.abs(heard).max() <= 1
        assert np.square(heard[side]).mean() > 20 * np.square(heard[1 - side]).mean()
        assert abs(np.abs(np.fft.rfft(heard[side])).argmax() - PITCHES[shape]) <= 1


def test_louder_when_larger_and_silent_when_gone():
    energy = [
        np.square(sound(Scene((Object("star", "red", size, "still", 0.5, 0.5),)), 1.0)).mean()
        for size in ("small", "medium", "large")
    ]
    assert energy[0] < energy[1] < energy[2]
    heard = sound(Scene((Object("star", "red", "large", "appear", 0.5, 0.5, phase=0.5),)), 1.0)
    assert not heard[:, : RATE // 2 - 400].any() and heard[:, RATE // 2 + 400 :].any()


def test_clicks_are_heard_where_the_truth_says_so():
    thing = Object("square", "blue", "small", "bounce", 0.5, 0.7, rate=1.2, span=0.3, phase=0.4)
    times = bounce_times(thing, 2.125)
    assert truth(Scene((thing,)), fields=("sounds",))["sounds"][:, 0].tolist() == pytest.approx(times)
    heard = sound(Scene((thing,)))[0]
    quiet = sound(Scene((Object("square", "blue", "small", "still", 0.5, 0.7),)))[0]
    rough = np.abs(np.diff(heard - quiet)) > 0.05
    first = np.flatnonzero(
        rough & ~np.concatenate([[False], [rough[max(i - 400, 0) : i].any() for i in range(1, len(rough))]])
    )
    assert (first / RATE).tolist() == pytest.approx(times, abs=0.002)
    at = poses(Scene((thing,)), np.array(times)).y[0]
    assert at == pytest.approx(0.7)


def test_the_dataset_gives_clips():
    data = Zoetrope("validation", size=32, frames=5, length=10, controls=("depth", "flow"), audio=True)
    clip = data[3]
    assert isinstance(clip, Clip) and clip.video.shape == (1, 3, 5, 32, 32) and len(data) == 10
    assert clip.video.min() >= -1 and clip.video.max() <= 1 and clip.keys == ("zoetrope/validation/3",)
    assert clip.captions == (data.caption(3),)
    assert clip.controls["depth"].shape == (1, 1, 5, 32, 32) and clip.controls["flow"].shape == (1, 2, 5, 32, 32)
    assert clip.audio.shape == (1, 2, 10_000) and clip.audio_rate == RATE
    again = pickle.loads(pickle.dumps(data))[3]
    assert torch.equal(again.video, clip.video) and again.captions == clip.captions
    assert len(Clip.stack([data[0], data[1]])) == 2


def test_one_frame_of_the_dataset_is_an_image():
    data = Zoetrope(size=32, short_captions=0, controls=("camera", "mask"))
    image = data.get(2, frames=1)
    assert image.video.shape == (1, 3, 1, 32, 32) and image.captions == (data.caption(2, 1),)
    assert parse(image.captions[0]).objects == Attributes.of(data.scene(2, 1), image=True).objects
    assert image.controls["camera"].shape == (1, 1, 3, 4) and image.controls["mask"].dtype == torch.bool
    assert set(data.get(2, frames=1, controls=("depth",)).controls) == {"depth"}


def test_mistakes_are_told_in_one_line():
    for mistake, words in (
        (lambda: Zoetrope("test"), "unknown split 'test'"),
        (lambda: Zoetrope(short_captions=2), "short_captions is a share between 0 and 1; got 2"),
        (lambda: Zoetrope(controls=("edges",)), "no control 'edges'"),
        (lambda: sample_scene(0, "test", 0), "unknown split 'test'"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            mistake()
        assert "\n" not in str(error.value)
    with pytest.raises(IndexError, match="indices 0 to 9"):
        Zoetrope(length=10)[10]


def _dilated(mask, pixels):
    """Grows (..., H, W) masks by a square."""
    for _ in range(pixels):
        for axis in (-1, -2):
            mask = mask | _moved(mask, 1, axis) | _moved(mask, -1, axis)
    return mask


def _eroded(mask, pixels):
    return ~_dilated(~mask, pixels)


def _moved(mask, by, axis):
    moved = np.roll(mask, by, axis)
    edge = [slice(None)] * mask.ndim
    edge[axis] = 0 if by > 0 else -1
    moved[tuple(edge)] = False
    return moved


def test_motions_can_be_chosen():
    data = Zoetrope(motions=["bounce"], length=50)
    scenes = [data.scene(index) for index in range(50)]
    assert {thing.motion for scene in scenes for thing in scene.objects} == {"bounce"}
    assert len({scene.camera for scene in scenes}) > 1 and len({len(scene.objects) for scene in scenes}) > 1
    left = Zoetrope(motions=["left"], length=50)  # which nothing does under a moving camera
    assert {left.scene(index).camera for index in range(50)} == {"static"}
    assert Zoetrope(length=50).scene(3) == Zoetrope(length=50, motions=()).scene(3)
    with pytest.raises(ValueError, match="no motion 'fly'"):
        Zoetrope(motions=["fly"])
    with pytest.raises(ValueError, match="held-out motions"):
        Zoetrope("compositional", motions=["bounce"])
