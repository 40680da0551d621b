"""Key frames, then what lies between: what stays, how many there are, and what rates the model is told."""

import json
from types import SimpleNamespace

import pytest
import torch

from reelm.data.clip import Clip
from reelm.engine import seeds
from reelm.engine.hierarchy import between, make_in_stages
from reelm.engine.inputs import Inputs
from reelm.engine.job import Job, run_job
from reelm.engine.video_lm import VideoLM
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.layouts import DualChannel
from reelm.lm.sampling import Sampling
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary, frame_rate_token
from reelm.tasks.formats import Format, Formats
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KeyFrames, KnownFrames
from reelm.tokenizers.palette import Colours, Palette
from reelm.tokenizers.text import SentencePieceText

RATES = (8.0, 4.0, 2.0)


@pytest.fixture(scope="module")
def model() -> VideoLM:
    torch.manual_seed(0)
    text = SentencePieceText.train([f"a red star moves left {i}" for i in range(20)], 400)
    head = Categorical(Vocabulary(4, text=text.vocabulary), 24)
    lm = LanguageModel(Transformer(24, 1, 2, sites=(8, 8, 8), layout=DualChannel(4)), head)
    tasks = {
        task.name: task
        for task in (Generation("t2v"), KnownFrames("i2v"), KnownFrames("continuation", (3,)), KeyFrames())
    }
    formats = Formats(tuple(Format(5, (8, 8), rate) for rate in RATES))
    return VideoLM(Palette(Colours(4)), text, lm, tasks, sampling=Sampling(), formats=formats).eval()


@pytest.fixture
def calls(model, monkeypatch) -> list[SimpleNamespace]:
    """What the model is asked for, and what it makes."""
    seen, generate = [], model.generate

    def spied(given, task, sampling, seed, *more, **options):
        clip = generate(given, task, sampling, seed, *more, **options)
        seen.append(SimpleNamespace(given=given, task=task, seed=seed, clip=clip))
        return clip

    monkeypatch.setattr(model, "generate", spied)
    return seen


def test_every_second_frame_is_known():
    clip = Clip(torch.rand(2, 3, 6, 4, 4), 8.0, ("", ""))
    given, target = KeyFrames().split(clip)
    assert given.known[0, 0, :, 0, 0].tolist() == [True, False, True, False, True, False] and target is clip
    assert torch.equal(given.video[:, :, ::2], clip.video[:, :, ::2]) and not given.video[:, :, 1::2].any()
    with pytest.raises(ValueError, match="key_frames needs clips of 3 frames"):
        KeyFrames().split(Clip(torch.rand(1, 3, 1, 4, 4), 8.0, ("",)))


@pytest.mark.parametrize("keys, windows", [(3, [0]), (5, [0, 2]), (6, [0, 2, 3]), (2, [0])])
def test_frames_between_are_made_window_by_window_and_keys_stay(keys, windows):
    clip, asked = Clip(torch.rand(2, 3, keys, 4, 4), 2.0, ("a", "b")), []

    def generate(given, number):
        asked.append(given)
        return torch.full((2, 3, 5, 4, 4), -1.0 - number)

    made = between(clip, 5, 4.0, generate)
    assert made.frames == 2 * keys - 1 and made.fps == 4.0 and made.captions == ("a", "b")
    assert torch.equal(made.video[:, :, ::2], clip.video)
    assert (made.video[:, :, 1::2] < 0).all() and len(asked) == len(windows)
    for given, start in zip(asked, windows, strict=True):
        index = torch.arange(start, start + 3).clamp_max(keys - 1)
        assert given.fps == 4.0 and given.shape == (5, 4, 4)
        assert torch.equal(given.video[:, :, ::2], clip.video[:, :, index])
        assert given.known[0, 0, :, 0, 0].tolist() == [True, False, True, False, True]


def test_key_frames_come_first_and_rates_double(model, calls):
    clip = make_in_stages(model, "t2v", Inputs(prompt="a red star"), 2, samples=2, seed=7)
    assert clip.video.shape == (2, 3, 17, 8, 8) and clip.fps == 8.0 and clip.captions == ("a red star",) * 2
    assert [(call.task, call.given.fps) for call in calls] == (
        [("t2v", 2.0)] + [("key_frames", 4.0)] * 2 + [("key_frames", 8.0)] * 4
    )
    assert torch.equal(clip.video[:, :, ::4], calls[0].clip.video.cpu())
    assert torch.equal(clip.video[:, :, 2:8:4], calls[1].clip.video[:, :, 1::2].cpu())
    assert [call.seed for call in calls[:3]] == [7, 7 + seeds.STAGE, 7 + seeds.STAGE + seeds.WINDOW]
    for call in calls:  # the frame rate is a token of the prompt
        packed = model.packer.pack(call.given, model.task(call.task).marker)
        assert (packed.ids == frame_rate_token(call.given.fps)).sum(1).tolist() == [1, 1]
    again = make_in_stages(model, "t2v", Inputs(prompt="a red star"), 2, samples=2, seed=7)
    assert torch.equal(again.video, clip.video)


def test_clips_of_any_length_and_from_a_picture(model, calls):
    picture = Clip(torch.rand(1, 3, 1, 8, 8) * 2 - 1, 8.0, ("",))
    clip = make_in_stages(model, "i2v", Inputs(image=picture), 1, frames=12)
    assert clip.video.shape == (1, 3, 12, 8, 8) and torch.equal(clip.video[:, :, :1], picture.video)
    assert [call.task for call in calls] == ["i2v", "continuation", *["key_frames"] * 3]
    assert {call.given.fps for call in calls} == {4.0, 8.0}


def test_a_call_of_the_program(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    job = Job(str(tmp_path / "model"), None, Inputs("a star"), str(tmp_path / "a.gif"), dtype="float32", stages=2)
    run_job(job, {}, {})
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["frames"], record["fps"], record["stages"]) == (17, 8.0, 2)


def test_mistakes_are_one_line(model):
    for stages, task, message in (
        (3, "t2v", r"at fps=2; got \[8,8\] at fps=1"),
        (0, "t2v", "stages is 1 or more"),
        (1, "key_frames", "with task=t2v"),
    ):
        with pytest.raises(ValueError, match=message):
            make_in_stages(model, task, Inputs("a star"), stages)
    plain = VideoLM(model.tokenizer, model.text, model.lm, {"t2v": Generation("t2v")}, (5, 8, 8), 8.0)
    with pytest.raises(ValueError, match="stages=2 needs a model that was trained for the task key_frames"):
        make_in_stages(plain, "t2v", Inputs("a star"), 2)
    with pytest.raises(ValueError, match="leave chain and actions out"):
        Job("m", None, Inputs("a star"), chain=["t2v"], stages=1).steps()
    with pytest.raises(ValueError, match=r"actions is a list of whole numbers such as \[0,3,3\]; got 3"):
        Job("m", None, Inputs("a star"), actions=3).steps()
    with pytest.raises(ValueError, match="windows of 2 frames have none between"):
        between(Clip(torch.rand(1, 3, 3, 4, 4), 2.0, ("",)), 2, 4.0, lambda given, number: given.video)
