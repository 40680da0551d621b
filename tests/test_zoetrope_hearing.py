"""The judge of sound: never wrong on true sound, at chance with another's, calm about noise."""

import numpy as np
import pytest
import torch

from reelm.data.zoetrope.scene import Object, Scene, sample_scene
from reelm.data.zoetrope.sound import PITCHES, sound
from reelm.evaluation.zoetrope_hearing import ATTRIBUTES, hear, picture, score, truth_of
from reelm.evaluation.zoetrope_judge import Tally

NUMBER = {shape: number for number, shape in enumerate(PITCHES)}


def shares(pairs) -> dict[str, float]:
    tally = Tally()
    for heard, truth in pairs:
        tally.note(score(heard, truth), single=False)
    return tally.shares()["all"]


@pytest.fixture(scope="module")
def true():
    scenes = [sample_scene(5, "validation", i) for i in range(40)]
    return [sound(scene) for scene in scenes], [truth_of(scene) for scene in scenes]


def test_true_sound_is_heard_and_that_of_others_is_chance(true):
    sounds, truths = true
    heard = [hear(each) for each in sounds]
    right = shares(zip(heard, truths))
    assert set(right) == {*ATTRIBUTES, "all"} and right["all"] >= 0.995
    chance = shares(zip(heard, truths[1:] + truths[:1]))
    assert chance["pitch"] < 0.5 and chance["loudness"] < 0.3 and chance["pan"] < 0.3 and chance["bounces"] < 0.2


def test_noise_does_not_mislead(true):
    sounds, truths = true
    noise = np.random.default_rng(0)
    heard = [hear(np.clip(each + noise.normal(0, 0.02, each.shape), -1, 1)) for each in sounds[:15]]
    assert shares(zip(heard, truths))["all"] >= 0.99
    silence = [hear(noise.normal(0, 0.02, each.shape)) for each in sounds[:15]]
    assert all(not heard.voices and not heard.clicks for heard in silence)


def test_what_is_wrong_is_told():
    still = Scene((Object("star", "red", "large", "still", 0.2, 0.5),))
    bouncing = Object("circle", "blue", "medium", "bounce", 0.8, 0.7, rate=1.2, span=0.3)
    scene = Scene((*still.objects, bouncing))
    wave, truth = sound(scene), truth_of(scene)
    assert hear(wave).voices == truth.voices == (NUMBER["circle"], NUMBER["star"])
    assert len(truth.clicks) == 2 and all(right == total for right, total in score(hear(wave), truth).values())
    wrong = {
        "loudness": wave * 0.5,
        "pan": wave[::-1].copy(),
        "bounces": np.roll(wave, 1600, 1),
        "pitch": sound(still),
    }
    for name, other in wrong.items():
        right, total = score(hear(other), truth)[name]
        assert right < total, name
    assert (
        score(hear(sound(still)), truth)["bouncing"] == (0, 1) and score(hear(wave), truth_of(still))["bounces"][0] == 0
    )
    assert score(hear(np.zeros_like(wave)), truth)["voices"] == (0, 1)


def test_voices_that_begin_and_end():
    things = (
        Object("heart", "red", "small", "appear", 0.3, 0.3, phase=0.9),
        Object("cross", "blue", "large", "vanish", 0.7, 0.7, phase=1.3),
        Object("cross", "green", "small", "vanish", 0.3, 0.7, phase=0.8),  # the other of its pitch goes on
    )
    truth, heard = truth_of(Scene(things)), hear(torch.from_numpy(sound(Scene(things))))
    expected = [(0.9, NUMBER["heart"], 1), (1.3, NUMBER["cross"], -1)]
    for changes in (truth.changes, heard.changes):
        assert [change[1:] for change in changes] == [change[1:] for change in expected]
        assert all(abs(a[0] - b[0]) < 0.03 for a, b in zip(changes, expected))


def test_other_lengths_and_rates_and_pictures():
    scene = sample_scene(5, "validation", 3, seconds=2.75)
    assert all(
        right == total
        for right, total in score(hear(sound(scene, 2.75, 24_000), 24_000), truth_of(scene, 2.75)).values()
    )
    own = torch.from_numpy(sound(scene, 2.75))
    shown = picture(own, own, 16_000, truth_of(scene, 2.75))
    assert shown.shape == (3, 1, 160, 420) and shown.min() >= -1 and shown.max() <= 1 and shown.std() > 0.05
    with pytest.raises(ValueError, match="hears one stereo sound"):
        hear(np.zeros((1, 100)))
