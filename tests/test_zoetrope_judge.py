"""The judge: nearly never wrong on true clips, at chance with others' captions, calm about blur and noise."""

import numpy as np
import pytest
import torch

from reelm.data.zoetrope.captions import Attributes, caption, parse
from reelm.data.zoetrope.render import render
from reelm.data.zoetrope.scene import STYLES, Object, Scene, sample_scene
from reelm.evaluation.zoetrope_judge import Tally, score
from reelm.evaluation.zoetrope_reading import Reading, Seen, read


def shares(readings, asked) -> dict[str, float]:
    tally = Tally()
    for reading, want in zip(readings, asked, strict=True):
        tally.add(reading, want)
    return tally.shares()["all"]


def worn(pixels, sigma=0.6, noise=6.0, seed=0):
    """The clip as a mediocre tokenizer would give it back: blurred and noisy."""
    kernel = np.exp(-np.square(np.arange(-3, 4)) / (2 * sigma**2))
    kernel /= kernel.sum()
    values = pixels.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(values, [(3, 3) if i == axis else (0, 0) for i in range(4)], mode="edge")
        size = values.shape[axis]
        values = sum(k * np.take(padded, range(j, j + size), axis) for j, k in enumerate(kernel))
    values += np.random.default_rng(seed).normal(0, noise, values.shape)
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def test_a_simple_clip_is_read_in_every_style():
    objects = (
        Object("star", "red", "medium", "left", 0.75, 0.3, rate=0.2),
        Object("circle", "blue", "large", "still", 0.5, 0.75),
    )
    for style in STYLES:
        reading = read(render(Scene(objects, "checker", "static", style)))
        expected = {Seen("star", "red", "medium", "left"), Seen("circle", "blue", "large", "still")}
        assert set(reading.objects) == expected and reading.count == 2
        assert (reading.background, reading.camera, reading.style) == ("checker", "static", style)


def test_arrays_tensors_and_larger_frames_read_alike():
    scene = sample_scene(0, "validation", 4)
    pixels = render(scene, 9)
    video = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert read(video) == read(pixels)
    assert score(read(render(scene, size=128)), scene) == score(read(render(scene)), scene)


def test_true_clips_are_read_and_shuffled_captions_are_chance():
    scenes = [sample_scene(3, "validation", i) for i in range(24)]
    readings = [read(render(scene)) for scene in scenes]
    assert shares(readings, scenes)["all"] > 0.97
    chance = shares(readings, scenes[1:] + scenes[:1])
    assert chance["colour"] < 0.5 and chance["shape"] < 0.45 and chance["motion"] < 0.3 and chance["style"] < 0.6


def test_a_tally_keeps_scenes_of_one_object_apart():
    tally = Tally()
    star = Seen("star", "red", "small", "left")
    tally.add(Reading((star,), "plain", "static", "flat"), parse("a red star"))
    tally.add(Reading((star,), "plain", "static", "flat"), parse("a red heart and a blue star"))
    assert tally.shares() == {
        "all": {"count": 0.5, "all": 0.5, "colour": 0.6667, "shape": 0.3333},
        "one object": {"count": 1.0, "all": 1.0, "colour": 1.0, "shape": 1.0},
    }


def test_images_have_neither_motion_nor_camera():
    scenes = [sample_scene(2, "train", i, still=True) for i in range(25)]
    reading = read(render(scenes[0], 1))
    assert reading.camera is None and all(seen.motion is None for seen in reading.objects)
    found = shares([read(render(scene, 1)) for scene in scenes], scenes)
    assert "motion" not in found and "camera" not in found and found["all"] > 0.97


def test_blur_and_noise_hardly_matter():
    scenes = [sample_scene(5, "train", i) for i in range(16)]
    assert shares([read(worn(render(scene))) for scene in scenes], scenes)["all"] > 0.95


def test_an_empty_clip_has_no_objects():
    reading = read(np.full((5, 64, 64, 3), 60, np.uint8))
    assert reading.objects == () and reading.background == "plain" and reading.camera == "static"
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    assert isinstance(read(noise), Reading)


def test_only_what_was_asked_counts():
    reading = Reading(
        (Seen("star", "red", "small", "left"), Seen("heart", "blue", "large", "spin")), "plain", "static", "flat"
    )
    assert score(reading, parse("a blue heart")) == {"count": (0, 1), "colour": (1, 1), "shape": (1, 1)}
    assert score(reading, parse("a red circle moves left and a green heart")) == {
        "count": (1, 1),
        "colour": (1, 2),
        "shape": (1, 2),
        "motion": (1, 1),
    }
    assert score(reading, parse("in neon style")) == {"style": (0, 1)}
    assert score(reading, parse("nothing to see")) == {}
    assert score(Reading((), "plain", "static", "flat"), parse("a red star")) == {
        "count": (0, 1),
        "colour": (0, 1),
        "shape": (0, 1),
    }


def test_a_scene_and_its_full_caption_ask_for_the_same():
    scene = sample_scene(7, "train", 2)
    told = parse(caption(scene, 0, full=True))
    assert told.objects == Attributes.of(scene).objects


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="reads one clip"):
        read(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="reads one clip"):
        read(torch.zeros(1, 3, 5, 64, 64))


def test_a_white_clip_is_read_without_complaint():
    assert read(np.full((3, 64, 64, 3), 255, np.uint8)).style in STYLES
