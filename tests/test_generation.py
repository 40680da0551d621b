"""What a user hands to generate, and what comes out."""

import pytest
import torch
from PIL import Image

from making import FAST, TASKS
from reelm.data.reading import read_video
from reelm.data.writing import write_image
from reelm.engine.chain import chain_of, make_chain
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs, overlap
from reelm.engine.video_lm import VideoLM
from reelm.tasks.formats import Format, Formats


@pytest.fixture(scope="module")
def several(model) -> VideoLM:
    """A model of two sizes, and of two lengths of the first."""
    formats = Formats((Format(9, (32, 32)), Format(17, (32, 32)), Format(9, (24, 40), 12.0)))
    return VideoLM(model.tokenizer, model.text, model.lm, TASKS, sampling=FAST, formats=formats).eval()


def test_each_task_makes_a_clip_of_its_shape_from_any_material(model, material):
    photo, clip, mask = (str(material / name) for name in ("photo.jpg", "clip.mp4", "mask.png"))
    asked = {
        "t2v": Inputs("a red star"), "t2i": Inputs("a red star"), "unconditional": Inputs(),
        "i2v": Inputs(image=photo), "continuation": Inputs(video=clip), "interpolation": Inputs(image=photo, last=clip),
        "inpainting": Inputs(video=clip, mask=mask), "outpainting": Inputs(video=clip),
        "stylization": Inputs("in neon style", video=clip), "backward": Inputs(video=clip),
        "connection": Inputs(video=clip, last=clip), "loop": Inputs(image=photo),
    }  # fmt: skip
    for task, inputs in asked.items():
        result = make(model, task, inputs, samples=2)
        frames = {"t2i": 1, "loop": 8}.get(task, 9)  # after a loop's last frame its first one comes again
        assert result.video.shape == (2, 3, frames, 32, 32), task
        assert result.video.abs().max() <= 1 and torch.isfinite(result.video).all(), task


def test_inputs_say_which_task_they_mean():
    named = {
        "t2v": Inputs("x"), "i2v": Inputs(image="a"), "interpolation": Inputs(image="a", last="b"),
        "continuation": Inputs(video="a"), "inpainting": Inputs(video="a", mask="b"),
        "connection": Inputs(video="a", last="b"),
    }  # fmt: skip
    assert all(inputs.task() == task for task, inputs in named.items())


def test_known_pixels_stay_unless_told_otherwise(model, material):
    inputs = Inputs(video=str(material / "clip.mp4"), mask=str(material / "mask.png"))
    source = read_video(material / "clip.mp4", fps=8.0, frames=9, size=(32, 32)).video
    kept = make(model, "inpainting", inputs).video
    shown = make(model, "inpainting", inputs, keep_known=False).video
    same = (kept == source).all(1)[0]
    assert same[:, 0, 0].all() and not same.all()
    assert not (shown == source)[..., 0, 0].all()


def test_a_continuation_begins_with_the_end_of_its_clip_and_goes_on_window_by_window(model, material):
    result = make(model, "continuation", Inputs(video=str(material / "clip.mp4")), frames=21)
    source = read_video(material / "clip.mp4", fps=8.0, frames=5, size=(32, 32), start=2.0 - 5 / 8).video
    assert result.frames == 21
    assert (result.video[:, :, :5] - source).abs().max() < 0.1


def test_a_backward_continuation_ends_with_the_beginning_of_its_clip(model, material):
    clip = str(material / "clip.mp4")
    source = read_video(clip, fps=8.0, frames=5, size=(32, 32)).video
    for frames in (9, 21):
        result = make(model, "backward", Inputs(video=clip), frames=frames)
        assert result.frames == frames
        assert (result.video[:, :, -5:] - source).abs().max() < 0.1


def test_a_connection_and_a_loop_hold_what_they_lead_from_and_to(model, material):
    clip, photo = str(material / "clip.mp4"), str(material / "photo.jpg")
    bright, dark = (read_video(clip, frames=1, size=32, start=start).video for start in (1.9, 0.0))
    made = make(model, "connection", Inputs(video=clip, last=clip)).video  # from its end to its beginning: a loop
    assert (made[:, :, :1] - bright).abs().max() < 0.1 and (made[:, :, -1:] - dark).abs().max() < 0.1
    told = []
    model.packer.pack, pack = (
        lambda given, *rest, **more: told.append(given) or pack(given, *rest, **more),
        model.packer.pack,
    )
    loop = make(model, "loop", Inputs(image=photo)).video
    del model.packer.pack
    assert torch.equal(told[0].video[:, :, 0], told[0].video[:, :, 8]) and torch.equal(
        loop[:, :, 0], told[0].video[:, :, 0]
    )


def test_a_model_of_several_formats_makes_what_is_asked_for(several, material):
    made = make(several, "t2v", Inputs("a star"), size=(24, 40), fps=12.0)
    assert made.video.shape == (1, 3, 9, 24, 40) and made.fps == 12.0
    assert make(several, "t2v", Inputs("a star")).video.shape == (1, 3, 9, 32, 32)
    lengths = []
    for frames in (5, 9, 13, 17, 25):  # as much as fits a format and is cut, or window after window
        made = make(several, "t2v", Inputs("a star"), frames=frames, progress=lambda _, asked: lengths.append(asked))
        assert made.frames == frames
    assert list(dict.fromkeys(lengths)) == [3 * 16, 5 * 16]  # the second window knows two latent frames, as in training
    assert make(several, "t2i", Inputs("a star"), size=(24, 40), fps=12.0).video.shape == (1, 3, 1, 24, 40)
    outer = make(several, "outpainting", Inputs(video=str(material / "clip.mp4")), size=(24, 40), fps=12.0)
    assert outer.video.shape == (1, 3, 9, 24, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (40, 24)}, r"makes clips of size=\[32,32\] at fps=8, .*; got \[40,24\] at fps=8"),
        ({"fps": 12.0}, r"got \[32,32\] at fps=12"),
        ({"frames": 25, "task": "interpolation"}, "task=interpolation makes clips of up to 17 frames"),
        ({"frames": 13, "task": "interpolation"}, "task=interpolation makes clips of 17 frames"),
    ],
)
def test_formats_that_there_are_not_are_told(several, material, options, message):
    photo = str(material / "photo.jpg")
    task = options.pop("task", "t2v")
    with pytest.raises(ValueError, match=message):
        make(several, task, Inputs("a star") if task == "t2v" else Inputs(image=photo, last=photo), **options)


def test_a_model_of_one_format_makes_that_one(model):
    with pytest.raises(ValueError, match=r"makes clips of size=\[32,32\] at fps=8; got \[24,40\] at fps=8"):
        make(model, "t2v", Inputs("a star"), size=(24, 40))
    assert make(model, "t2v", Inputs("a star"), size=(32, 32), fps=8.0).video.shape == (1, 3, 9, 32, 32)


def test_other_lengths_are_rounded_with_a_note(model):
    notes = []
    assert make(model, "t2v", Inputs("a star"), frames=8, note=notes.append).frames == 9
    assert "1 + 4k" in notes[0] and "9" in notes[0]


def test_a_sample_of_a_long_clip_does_not_depend_on_the_others(model):
    several = make(model, "t2v", Inputs("a star"), frames=21, samples=3, seed=5)
    alone = make(model, "t2v", Inputs("a star"), frames=21, seed=6)
    torch.testing.assert_close(several.video[1:2], alone.video, rtol=0, atol=1e-4)


def test_no_two_windows_or_links_draw_the_same(model, material, monkeypatch):
    told, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **more: told.append(args[3]) or generate(*args, **more))
    make(model, "t2v", Inputs("a star"), frames=21, seed=5)
    make_chain(model, chain_of(["t2i", "i2v"], Inputs("a star")), frames=21, seed=5)
    assert len(told) == 4 + 1 + 4 and told[0] == told[4] == 5 and len(set(told)) == 8


def test_the_same_seed_gives_the_same_clip(model):
    first, second, other = (make(model, "t2v", Inputs("a star"), seed=seed).video for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("task", "inputs", "options", "message"),
    [
        ("t2v", Inputs(""), {}, "needs prompt"),
        ("t2v", Inputs("  "), {}, "needs prompt"),
        ("t2v", Inputs("x"), {"frames": 0}, "frames=0; give 1 or more"),
        ("outpainting", Inputs(video="CLIP", start=-1.0), {}, "start=-1.0 is the second"),
        ("outpainting", Inputs(video="CLIP", start=99.0), {}, "ends before start=99 s"),
        ("i2v", Inputs("x"), {}, "needs image"),
        ("i2v", Inputs(image="nowhere.png"), {}, "nowhere.png"),
        ("inpainting", Inputs(video="CLIP", mask="SMALL"), {}, "as large as the video"),
        ("inpainting", Inputs(video="CLIP", mask="BLACK"), {}, "all black"),
        ("t2v", Inputs(prompt="a red star", image="CLIP"), {}, "task=t2v has no use for image="),
        ("t2v", Inputs("x", keep=0.3), {}, "task=t2v has no use for keep=0.3; leave it out"),
        ("unconditional", Inputs("x"), {}, "task=unconditional heeds no prompt; leave prompt='x' out"),
        ("continuation", Inputs(video="CLIP", start=1.0), {}, "task=continuation has no use for start=1.0"),
        ("outpainting", Inputs(video="CLIP", keep=1.5), {}, "keep=1.5"),
        ("interpolation", Inputs(image="PHOTO", last="PHOTO"), {"frames": 33}, "up to 9 frames"),
        ("dance", Inputs("x"), {}, "dance"),
    ],
)
def test_mistakes_are_one_line(model, material, task, inputs, options, message):
    words = {"CLIP": "clip.mp4", "SMALL": "small.png", "BLACK": "black.png", "PHOTO": "photo.jpg"}
    given = {k: str(material / words[v]) if v in words else v for k, v in vars(inputs).items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        make(model, task, Inputs(**given), **options)
    assert "\n" not in str(caught.value)


def test_write_image_takes_a_made_image(model, tmp_path):
    write_image(tmp_path / "a.png", make(model, "t2i", Inputs("a star")))
    assert Image.open(tmp_path / "a.png").size == (32, 32)


def test_no_more_is_shared_by_windows_than_the_task_was_learned_with(model):
    long = Format(33, (32, 32), 16.0)
    shared = [overlap(model, long, task) for task in ("t2v", "continuation", "backward", "connection")]
    assert shared == [17, 5, 5, 17]  # connection was learned with one frame alone: no latent frame to go on from


@pytest.mark.parametrize("task", ["continuation", "backward"])
def test_a_short_clip_is_not_all_known(several, material, task):
    told, made = (
        make(several, task, Inputs(video=str(material / "clip.mp4")), frames=5, keep_known=keep, sampling=FAST, seed=3)
        for keep in (True, False)
    )
    same = (
        told.video
        == make(several, task, Inputs(video=str(material / "clip.mp4")), frames=5, sampling=FAST, seed=4).video
    )
    whole = same.flatten(3).all(-1)[0, 0]
    assert told.frames == made.frames == 5 and whole.sum() == 1  # one frame is known, four are made
    with pytest.raises(ValueError, match=f"task={task} with frames=1 would make nothing new; ask for 5 or more"):
        make(several, task, Inputs(video=str(material / "clip.mp4")), frames=1, sampling=FAST)


def test_settings_of_sampling_are_of_their_kind(model):
    with pytest.raises(ValueError, match="sampler.top_k is a whole number such as 0; got 2.5"):
        model.sampling_with({"top_k": 2.5})
    with pytest.raises(ValueError, match="ways to decode are chosen by sampler=jacobi"):
        model.sampling_with({"decoding": "jacobi"})
    assert model.sampling_with({"temperature": 0}).temperature == 0
