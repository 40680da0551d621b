"""Sound in use: what a user hands in, files, training, evaluation and mistakes."""

from fractions import Fraction

import av
import lightning as L
import numpy as np
import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.module import ClipData
from reelm.data.reading import probe, read_video
from reelm.data.writing import write_video
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import seeds
from reelm.engine.chain import chain_of, make_chain
from reelm.engine.evaluation import evaluate
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs, first_given
from reelm.engine.job import Job, run_job
from reelm.engine.lm_training import LMTraining
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_lm import VideoLM
from reelm.lm.heads import Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.transformer import Transformer
from reelm.tasks.task import Given, Mixture
from sounding import FAST, LOUD, RATE, SHAPE, TASKS, sounding_model


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return sounding_model()


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> str:
    """A clip of 2 s with a tone in its sound."""
    clock = np.arange(32_000) / RATE
    tone = torch.from_numpy(np.stack([np.sin(2 * np.pi * 440 * clock)] * 2)).float()[None] * 0.3
    video = torch.linspace(-1, 1, 16).view(1, 1, 16, 1, 1).expand(1, 3, 16, 32, 32).contiguous()
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_video(path, Clip(video, 8.0, audio=tone, audio_rate=RATE))
    return str(path)


def test_users_clips_and_sounds_are_taken(model, film):
    seen = read_video(film, frames=9, size=(16, 16)).video
    sounded = make(model, "v2a", Inputs(video=film), samples=2)
    assert torch.equal(sounded.video, seen.expand(2, -1, -1, -1, -1)) and sounded.audio.shape == (2, 2, 18_000)
    shown = make(model, "a2v", Inputs(audio=film, start=0.5))
    assert shown.video.shape == (1, 3, *SHAPE) and 0.1 < shown.audio.abs().max() < 0.5
    both = make(model, "t2av", Inputs("a red star"), frames=21)  # three windows
    assert both.frames == 21 and both.audio.shape[-1] == 42_000
    on = make(model, "av_continuation", Inputs(video=film))
    tail = read_video(film, frames=5, size=(16, 16), start=11 / 8).video
    assert (on.video[:, :, :5] - tail).abs().max() < 0.1 and on.audio.shape[-1] == 18_000
    assert Inputs(audio=film).task() == "a2v"


def test_sound_goes_through_a_chain(model):
    steps = chain_of(["t2v", "v2a", "a2v"], Inputs("a red star"))
    made = make_chain(model, steps, seed=1)
    first = make(model, "t2v", Inputs("a red star"), seed=1)
    second = make(model, "v2a", Inputs(video=first), seed=1 + seeds.LINK)
    torch.testing.assert_close(made.audio, second.audio, rtol=0, atol=1e-4)  # one other token: 0.01 and more
    assert made.video.shape == first.video.shape
    with pytest.raises(ValueError, match="has no sound to go on from"):
        make(model, "a2v", Inputs(audio=first))


def test_sound_of_another_rate_is_resampled_unless_it_is_a_tensor(model, tmp_path):
    clock = torch.arange(3 * 44_100) / 44_100
    tone = torch.stack([torch.sin(2 * np.pi * 440 * clock)] * 2)[None] * 0.3
    clip = Clip(torch.zeros(1, 3, 24, 16, 16), 8.0, audio=tone, audio_rate=44_100)
    write_video(tmp_path / "a.mp4", clip)
    for source in (clip, str(tmp_path / "a.mp4")):
        heard = make(model, "a2v", Inputs(audio=source, start=0.5))
        assert heard.audio_rate == RATE and heard.audio.shape == (1, 2, 18_000)
        power = torch.fft.rfft(heard.audio[0, 0]).abs()
        assert abs(int(power.argmax()) * RATE / 18_000 - 440) < 1
    given = Given(SHAPE, ("",), audio=tone, audio_rate=44_100)
    with pytest.raises(ValueError, match="the sound has 44100 samples a second; this model hears 16000: resample it"):
        model.generate(given, "a2v")


def test_sound_that_begins_after_its_picture_stays_in_time(model, tmp_path):
    with av.open(str(tmp_path / "late.mkv"), "w") as out:
        pictures, track = out.add_stream("libx264", rate=8), out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        pictures.width = pictures.height = 32
        for number in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            out.mux(pictures.encode(frame))
        out.mux(pictures.encode(None))
        noise = av.AudioFrame.from_ndarray(np.full((1, RATE // 4), 9000, np.int16), format="s16", layout="mono")
        noise.sample_rate, noise.time_base, noise.pts = RATE, Fraction(1, RATE), 3 * RATE // 2  # from 1.5 s to 1.75 s
        out.mux([*track.encode(noise), *track.encode(None)])
    given = first_given(model, "av_continuation", Inputs(video=str(tmp_path / "late.mkv")), model.fitting(), 1, 9)
    heard = (given.audio[0, 0] > 0.1).nonzero()[:, 0] / RATE + 11 / 8  # the last five of 16 frames are told
    assert given.leading == 5 and abs(heard[0] - 1.5) < 0.01 and abs(heard[-1] - 1.75) < 0.01


def test_a_prompt_alone_makes_what_the_task_asks_for(model):
    assert model.generate("a red star", "t2av").audio.shape == (1, 2, 18_000)
    assert model.generate("a red star").audio is None
    for task in ("v2a", "a2v", "av_continuation"):
        with pytest.raises(ValueError, match=f"task={task} needs more than a prompt"):
            model.generate("a red star", task)


def test_sound_is_written_with_the_clip(box, tmp_path):
    paths = run_job(Job(str(box), "t2av", Inputs("a red star"), str(tmp_path / "a.mp4")), FAST, {})
    assert probe(paths[0]).has_audio and read_video(paths[0], frames=9, audio=True).audio.shape[-1] == 18_000


def test_a_model_learns_sound(model, box, tmp_path):
    parts = {name: TASKS[name] for name in LOUD}
    options = {"head": Chained, "optimisation": Optimisation(lr=1e-3), "text": 300}
    common = {"tokenizer": box / "tokenizer", "task": Mixture(parts, dict.fromkeys(parts, 1)), **options}
    with pytest.raises(ValueError, match="v2a needs an audio tokenizer: give its folder by stage.audio"):
        LMTraining(lm=Transformer(32, 1, 2), **common)
    training = LMTraining(lm=Transformer(32, 1, 2), audio=box / "audio", **common)
    world = {name: Zoetrope(name, size=16, frames=9) for name in ("train", "validation")}
    data = ClipData(world["train"], world["validation"], batch_size=2, validation_clips=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=8, max_epochs=-1, num_sanity_val_steps=0, enable_model_summary=False, **quiet)
    trainer.fit(training, data)
    assert {group.name for group in data.groups} == set(LOUD) and all(group.audio for group in data.groups)
    assert all(level.scores.weight.abs().max() > 0 for level in training.lm.head.sound)
    training.export(tmp_path / "model", 8)
    made = VideoLM.from_pretrained(tmp_path / "model").generate(
        Given(SHAPE, ("a star",), asks=("video", "audio")), "t2av"
    )
    assert made.audio.shape == (1, 2, 18_000)
    again = LMTraining(lm=Transformer(32, 1, 2), audio=box / "audio", **common)
    again.start_from(tmp_path / "model")
    silent = LMTraining(lm=Transformer(32, 1, 2), **{**common, "task": TASKS["t2v"]})
    with pytest.raises(ValueError, match=r"give the same stage\.audio="):
        silent.start_from(tmp_path / "model")


def test_sound_is_evaluated_beside_chance_and_ceiling(model, tmp_path):
    texts = []
    names = ["v2a", "a2v", "t2av"]
    results = evaluate(model, names, ("validation",), clips=3, batch=2, sheets=tmp_path, show=texts.append)[
        "validation"
    ]
    heard = {name: results[name].get("heard") for name in names}
    assert heard["a2v"] is None and set(heard["v2a"]["judge"]["all"]) >= {"voices", "pitch", "loudness", "pan", "all"}
    assert heard["v2a"]["judge"]["all"]["all"] == 1.0 and heard["v2a"]["generated"]["all"]["all"] < 1
    assert set(heard["t2av"]["chance"]["all"]) == {"voices", "pitch", "bouncing", "all"}
    assert not results["v2a"]["generated"] and results["v2a"]["clips"] == 3
    assert set(results["a2v"]["judge"]["all"]) == {"count", "shape", "size", "all"}
    assert {path.stem for path in tmp_path.iterdir()} == {
        "v2a_validation_sound", "a2v_validation", "t2av_validation", "t2av_validation_sound",
    }  # fmt: skip
    assert "loudness" in texts[0] and "colour" not in texts[0] and "colour" in texts[2] and "pitch" in texts[2]


def test_mistakes_with_sound_are_one_line(model, film, tmp_path):
    silent_file = tmp_path / "silent.mp4"
    write_video(silent_file, Clip(torch.zeros(1, 3, 9, 32, 32), 8.0))
    quiet = VideoLM(
        model.tokenizer, model.text, LanguageModel(model.lm.transformer, model.lm.head.visual), TASKS, SHAPE
    )
    for made, task, inputs, message in (
        (model, "a2v", Inputs(), "task=a2v needs audio="),
        (model, "a2v", Inputs(audio=str(silent_file)), "holds no sound that can be decoded"),
        (model, "av_continuation", Inputs(video=str(silent_file)), "holds no sound that can be decoded"),
        (model, "av_continuation", Inputs(audio=film), "task=av_continuation needs video="),
        (model, "a2v", Inputs(audio=film, start=-1), "start=-1 is the second"),
        (model, "t2v", Inputs("x", audio=film), "task=t2v has no use for audio="),
        (quiet, "a2v", Inputs(audio=film), "needs a model that was trained with an audio tokenizer"),
        (quiet, "v2a", Inputs(video=film), "neither hears nor makes sound"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            make(made, task, inputs)
        assert "\n" not in str(caught.value)
