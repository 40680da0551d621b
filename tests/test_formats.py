"""Several lengths, sizes and rates in one training."""

from collections import Counter
from math import prod
from types import SimpleNamespace

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.module import Group, GroupedBatches
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.evaluation import evaluate
from reelm.engine.groups import groups, one_format_each
from reelm.tasks.formats import Format, Formats
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.task import Mixture

FORMATS = Formats((Format(9, (32, 32), weight=2), Format(17, (32, 32)), Format(9, (16, 48), 12.0)))
MIXTURE = Mixture(
    {"t2v": Generation(), "i2v": KnownFrames("i2v"), "t2i": Generation("t2i", frames=1)}, {"t2v": 3, "i2v": 1, "t2i": 1}
)


def tokens(form: Format) -> int:
    return prod((1 + form.frames // 4, form.size[0] // 8, form.size[1] // 8))


def test_formats_are_checked():
    assert Formats(({"frames": 5, "size": [8, 16], "fps": 4},)).parts == (Format(5, (8, 16), 4),)
    with pytest.raises(ValueError, match="has frames, size, fps and weight, not length"):
        Formats(({"length": 5},))
    with pytest.raises(ValueError, match="differ from each other"):
        Formats((Format(), Format(weight=2)))
    with pytest.raises(ValueError, match="differ from each other"):
        Formats(())
    with pytest.raises(ValueError, match=r"weight above 0; got frames=17, size=\[64, 64\], fps=0, weight=1"):
        Format(fps=0)
    for wrong in ({"size": 64}, {"size": [64]}, {"frames": "two"}, {"size": "big"}):
        with pytest.raises(ValueError, match="a format has frames, size"):
            Format(**wrong)
    for wrong in (3, "17", {"frames": 9}):
        with pytest.raises(ValueError, match="formats are a list such as"):
            Formats(wrong)
    with pytest.raises(ValueError, match="a format is such as .*; got 9"):
        Formats([9])


def test_without_formats_each_task_has_one_group():
    made = groups(MIXTURE, None, tokens)
    assert [group.name for group in made] == ["t2v", "i2v", "t2i"]
    assert all(group.size is None and group.fps is None for group in made)
    assert [group.batch for group in made] == [1, 1, 4] and one_format_each(made) == made
    assert groups(Generation(), None, tokens) == [Group("t2v")]


def test_groups_are_of_one_length_and_hold_as_many_tokens():
    made = groups(MIXTURE, FORMATS, tokens)
    ways = {(g.name, g.frames, g.size, g.fps): g for g in made}
    assert len(ways) == len(made) == 3 + 3 + 2  # images of one size are one
    for group in made:
        form = Format(group.frames, group.size, group.fps)
        usual = tokens(Format(1, (32, 32))) * 4 if group.name == "t2i" else tokens(FORMATS.parts[0])
        assert group.batch * tokens(form) == pytest.approx(usual)
    each = one_format_each(made)
    assert [group.name for group in each] == ["t2v", "i2v", "t2i"] and len(
        {g.size for g in each} | {g.frames for g in each}
    ) > 2


def test_weights_count_clips():
    made = groups(MIXTURE, FORMATS, tokens)
    clips = Counter()
    for group in made:
        clips[group.name, group.frames, group.size] += group.share(0.9) * group.batch
    total = sum(clips.values())
    shares = {key: value / total for key, value in clips.items()}
    for name, share in (("t2v", 0.9 * 0.75), ("i2v", 0.9 * 0.25)):
        assert shares[name, 9, (32, 32)] == pytest.approx(share / 2)
        assert shares[name, 17, (32, 32)] == pytest.approx(share / 4)
        assert shares[name, 9, (16, 48)] == pytest.approx(share / 4)
    assert shares["t2i", 1, (32, 32)] == pytest.approx(0.075) and shares["t2i", 1, (16, 48)] == pytest.approx(0.025)


def test_a_step_is_of_one_format():
    world = Zoetrope(length=500)
    batches = GroupedBatches(world, groups(MIXTURE, FORMATS, tokens), 8, 40)
    seen = set()
    for batch in batches:
        (group,) = {request.group for request in batch}
        seen.add((group.frames, group.size, group.fps))
        clip = world.get(batch[0].index, **group.options())
        assert (clip.frames, clip.size) == (group.frames, group.size)
        assert clip.fps == group.fps
    assert len(seen) > 3


class Sketch:
    """A model that shows what it was asked for: nothing but whether the suite goes through its formats."""

    formats, shape, fps = FORMATS, FORMATS.parts[0].shape, 8.0
    tasks = {"t2v": Generation(), "t2i": Generation("t2i", frames=1)}
    packer = SimpleNamespace(text_length=len)
    tokenizer = SimpleNamespace(encode=lambda video: video, decode=lambda video: video)

    def task(self, name):
        return self.tasks[name]

    def fitting(self):
        return self.formats.parts[0]

    def generate(self, given, name, seed):
        return Clip(torch.rand(len(given), 3, *given.shape) * 2 - 1, given.fps)


def test_each_format_is_evaluated():
    results = evaluate(Sketch(), None, ("validation",), clips=1, batch=1, show=lambda text: None, formats=True)
    assert list(results["validation"]) == [
        name + mark for mark in ("", "_17x32x32", "_9x16x48_12fps") for name in ("t2v", "t2i")
    ]
    usual = evaluate(Sketch(), ["t2i"], ("validation",), clips=1, batch=1, show=lambda text: None)
    assert list(usual["validation"]) == ["t2i"]


def test_a_world_of_any_format_is_a_function_of_the_scene():
    world = Zoetrope("validation", size=64, controls=("depth", "flow"), audio=True)
    own = world.get(5)
    other = world.get(5, frames=33, size=(48, 80), fps=12.0)
    assert other.video.shape == (1, 3, 33, 48, 80) and other.fps == 12.0
    assert other.audio.shape[-1] == round(33 / 12 * 16000)
    assert {name: value.shape[2:] for name, value in other.controls.items()} == dict.fromkeys(
        ("depth", "flow"), (33, 48, 80)
    )
    assert (world.get(5, size=(64, 64), fps=8.0).video == own.video).all()
