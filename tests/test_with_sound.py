"""Tasks of video and sound: what is told, the sequence, the head and the model."""

import json
from dataclasses import replace

import pytest
import torch

from making import small_model
from reelm.data.clip import Clip
from reelm.engine import store
from reelm.engine.video_lm import VideoLM
from reelm.lm.decoding import OneByOne
from reelm.lm.parallel import Diagonal
from reelm.lm.sampling import Sampling
from reelm.lm.speculative import Jacobi
from reelm.lm.vocabulary import SPECIAL, Special, Vocabulary, task_token
from reelm.lm.weighting import Weighting
from reelm.tasks.packing import CONDITION_TIME, TEXT_TIME, Packer
from reelm.tasks.sound import SOUND_ROW, SoundTokens
from reelm.tasks.task import Given
from reelm.tasks.with_sound import WithSound
from sounding import (
    CAPTIONS,
    CODES,
    FAST,
    LATENTS,
    LEVELS,
    LOUD,
    PER_FRAME,
    RATE,
    SHAPE,
    TASKS,
    sounding_model,
)


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return sounding_model()


@pytest.fixture
def clip() -> Clip:
    sound = torch.rand(2, 2, 18_000) - 0.5
    return Clip(torch.rand(2, 3, *SHAPE) * 2 - 1, captions=CAPTIONS, audio=sound, audio_rate=RATE)


def split(name: str, clip: Clip) -> Given:
    return TASKS[name].split(clip, torch.Generator().manual_seed(0))[0]


# ---------------------------------------------------------------------------------------------------- tasks


def test_what_is_told_and_what_is_asked(clip):
    given = {name: split(name, clip) for name in TASKS}
    assert [given[name].asks for name in TASKS] == [("video",), ("audio",), ("video",), *[("video", "audio")] * 2]
    assert given["t2v"].audio is None and given["t2av"].audio is None and given["t2av"].known is None
    assert given["v2a"].known.all() and given["v2a"].audio is None and torch.equal(given["v2a"].video, clip.video)
    assert given["a2v"].known is None and torch.equal(given["a2v"].audio, clip.audio)
    both = given["av_continuation"]
    assert both.leading == 5 and torch.equal(both.audio, clip.audio[..., :10_000]) and both.audio_rate == RATE
    assert given["v2a"].captions == ("", "") and both.captions == CAPTIONS
    again = store.build(store.describe(TASKS))
    assert all((again[name].told, again[name].first) == (TASKS[name].told, TASKS[name].first) for name in LOUD)


@pytest.mark.parametrize("wrong", [{"asks": ()}, {"told": ["video"]}, {"asks": ["smell"]}])
def test_impossible_tasks_are_refused(wrong):
    with pytest.raises(ValueError, match="odd tells some of video, audio and asks for others"):
        WithSound("odd", **wrong)


def test_of_several_beginnings_those_count_that_leave_some_to_make(clip):
    task, short = WithSound("av_continuation", first=(1, 5)), clip.replace(video=clip.video[:, :, :5])
    assert {task.split(short, torch.Generator().manual_seed(seed))[0].leading for seed in range(9)} == {1}
    assert {task.split(clip, torch.Generator().manual_seed(seed))[0].leading for seed in range(9)} == {1, 5}
    with pytest.raises(ValueError, match="av_continuation knows 1 frames; a clip of 1 leaves none to make"):
        task.split(clip.replace(video=clip.video[:, :, :1]))


def test_a_clip_without_sound_is_named(clip):
    with pytest.raises(ValueError, match="v2a needs the sound of clips; the data source gave none"):
        split("v2a", clip.replace(audio=None))


# ---------------------------------------------------------------------------------------------------- sequence


def test_sound_goes_level_by_level_with_ids_and_places_of_its_own(model):
    sound = model.packer.sound
    codes = torch.randint(CODES, (2, LATENTS, LEVELS))
    ids = sound.ids(codes)
    assert torch.equal(sound.codes(ids), codes)
    start = model.lm.head.vocabulary.audio_range.start
    assert ids[0, :LATENTS].tolist() == [start + code for code in codes[0, :, 0].tolist()]
    assert ids[0, LATENTS:].tolist() == [start + CODES + code for code in codes[0, :, 1].tolist()]
    where = sound.positions(0, LATENTS, 8.0)
    assert where[0, :, 0].tolist() == [0] * 2 + [1] * 8 + [2] * 8  # two latents a frame, the first frame is alone
    assert where[1, :, 2].tolist() == [0, 1, *range(8), *range(8)]
    assert where[0, 0, 1] == SOUND_ROW and where[1, 0, 1] == SOUND_ROW + 1
    assert torch.equal(sound.positions(5, LATENTS, 8.0), where[:, 5:])
    assert len(set(map(tuple, where.flatten(0, 1).tolist()))) == LATENTS * LEVELS


def test_of_known_sound_whole_latents_count_or_all_of_it(model, clip):
    sound, given = model.packer.sound, split("av_continuation", clip)
    assert torch.equal(sound.known(given), sound.tokenizer.encode(clip.audio)[:, :10])  # causal: as of the whole
    assert sound.known(given.replace(audio=given.audio[..., :9_999])).shape[1] == 9
    assert sound.known(given.replace(audio=given.audio[..., :999])) is None
    assert sound.known(given.replace(audio=clip.audio)).shape[1] == LATENTS
    assert sound.known(given.replace(audio=torch.cat([clip.audio] * 2, 2))).shape[1] == LATENTS
    uneven = given.replace(shape=(8, 16, 16), fps=7.0, audio=clip.audio)  # 18,286 samples: the last latent is filled up
    assert sound.latents(uneven) == 19 and sound.known(uneven).shape[1] == 18
    with pytest.raises(ValueError, match="the sound has 8000 samples a second; this model hears 16000: resample it"):
        sound.known(given.replace(audio_rate=8000))
    with pytest.raises(ValueError, match="2 levels of 8 codes are another number"):
        SoundTokens(sound.tokenizer, Vocabulary(16, 8), 4)


def expected(model: VideoLM, name: str, clip: Clip) -> tuple[list[torch.Tensor], list[list[int]], int]:
    """Ids in pieces, places, and the number of columns of the prefix, written out."""
    packer, rows = model.packer, len(clip)
    video = packer.tokenizer.encode(clip.video).flatten(1) + SPECIAL
    codes = packer.sound.tokenizer.encode(clip.audio)
    where = [[t, y, x] for t in range(3) for y in range(2) for x in range(2)]
    spots = packer.sound.positions(0, LATENTS, 8.0)
    heard = 10 if name == "av_continuation" else 0

    def mark(token: int, row: int) -> None:
        ids.append(torch.full((rows, 1), int(token)))
        places.append([TEXT_TIME, row, 0])

    def away(part: torch.Tensor) -> list[list[int]]:
        return [[t - CONDITION_TIME, y, x] for t, y, x in part.flatten(0, 1).tolist()]

    text = packer.pack(split(name, clip), 0).ids[:, 3:11]
    ids: list[torch.Tensor] = []
    places: list[list[int]] = []
    mark(Special.bos, 0), mark(task_token(TASKS[name].marker), 1), mark(Special.bot_i, 2)
    ids.append(text)
    places += [[TEXT_TIME, 3, i] for i in range(8)]
    mark(Special.eot_i, 4)
    if name == "v2a":
        mark(Special.bov_i, 5)
        ids.append(video)
        places += [[t - CONDITION_TIME, y, x] for t, y, x in where]
        mark(Special.eov_i, 6)
    if name in ("a2v", "av_continuation"):
        known = heard or LATENTS
        mark(Special.boa_i, 11)
        ids.append(packer.sound.ids(codes[:, :known]))
        places += away(spots[:, :known])
        mark(Special.eoa_i, 12)
    if name != "v2a":
        mark(Special.bov_o, 7)
    prefix = len(places) + (2 * PER_FRAME if name == "av_continuation" else 0)
    if name != "v2a":
        ids.append(video)
        places += where
    if name != "a2v":
        mark(Special.boa_o, 13)
        prefix += name == "v2a"
        ids.append(packer.sound.ids(codes[:, heard:]))
        places += spots[:, heard:].flatten(0, 1).tolist()
    return ids, places, prefix


def packed(model: VideoLM, name: str, clip: Clip):
    packer, given = model.packer, split(name, clip)
    video = packer.tokenizer.encode(clip.video) if "video" in given.asks else None
    sound = packer.sound.encode(clip.audio, RATE) if "audio" in given.asks else None
    return packer.pack(given, TASKS[name].marker, video, sound=sound)


@pytest.mark.parametrize("name", LOUD)
def test_layout_token_by_token(model, clip, name):
    sequence = packed(model, name, clip)
    ids, places, prefix = expected(model, name, clip)
    assert torch.equal(sequence.ids, torch.cat(ids, 1))
    assert sequence.positions[0].tolist() == sequence.positions[1].tolist() == places
    assert sequence.prefix == prefix and not sequence.loss[:, :prefix].any()
    told = torch.zeros(len(places), dtype=torch.bool)
    told[:prefix] = True
    told |= sequence.ids[0] == int(Special.boa_o)  # it is asked for, not predicted
    assert torch.equal(sequence.loss[0], ~told)
    made = {"v2a": 36, "a2v": 12, "t2av": 48, "av_continuation": 4 + 16}[name]
    assert sequence.loss.sum() == 2 * made


@pytest.mark.parametrize("name", LOUD)
def test_inference_sees_the_prefix_of_training(model, clip, name):
    training, given = packed(model, name, clip), split(name, clip)
    inference = model.packer.pack(given, TASKS[name].marker)
    assert inference.length == inference.prefix == training.prefix
    for field in ("ids", "positions", "next_positions"):
        assert torch.equal(getattr(training, field)[:, : training.prefix], getattr(inference, field)), field


@pytest.mark.parametrize("name", TASKS)
def test_guidance_leaves_out_what_is_made_from(model, clip, name):
    """The prompt, and of a clip for its sound or a sound for its clip all of it: no prompt is told there."""
    given = split(name, clip)
    told = model.packer.pack(given, TASKS[name].marker)
    without = told.without_prompt()
    assert torch.equal(without.ids, model.packer.pack(given, TASKS[name].marker, unprompted=True).ids)
    vocabulary = model.lm.head.vocabulary
    ranges = {"a2v": vocabulary.audio_range, "v2a": vocabulary.visual_range}
    left_out = ranges.get(name, vocabulary.text_range)
    expected = (told.ids >= left_out.start) & (told.ids < left_out.stop)
    assert expected.any() and torch.equal(without.ids != told.ids, expected) and torch.equal(told.prompt, expected)
    assert (without.ids[expected] == int(Special.pad)).all() and model.packer.prompted(given)
    one = model.packer.pack(given, TASKS[name].marker, unprompted=torch.tensor([True, False])).ids
    assert torch.equal(one, torch.stack([without.ids[0], told.ids[1]]))


@pytest.mark.parametrize("name", ["v2a", "a2v"])
@pytest.mark.parametrize("packed", [False, True])
def test_codes_count_more_where_what_they_are_made_from_tells_of_them(model, clip, name, packed):
    torch.manual_seed(0)
    plain, weighted = (model.loss(clip, name, packed=packed, weighting=Weighting(prompt=k))[0] for k in (0.0, 8.0))
    dropped = model.loss(clip, name, torch.tensor([True, True]), packed=packed, weighting=Weighting(prompt=8.0))[0]
    assert abs(weighted - plain) > 1e-3
    torch.testing.assert_close(dropped, model.loss(clip, name, torch.tensor([True, True]), packed=packed)[0])


def test_guidance_makes_a_clip_heed_its_sound(model, clip):
    given = split("a2v", clip)
    ways = [replace(FAST, guidance=guidance) for guidance in (1.0, 3.0)]
    free, guided = (model.generate(given, "a2v", way, seed=0).video for way in ways)
    assert not torch.equal(free, guided)


def test_a_model_without_sound_says_so(model, clip):
    silent = Packer(model.tokenizer, model.text, model.lm.head.vocabulary)
    for name in LOUD:
        with pytest.raises(ValueError, match="neither hears nor makes sound"):
            silent.pack(split(name, clip), 0)
    with pytest.raises(ValueError, match="this model makes no sound; leave sampler.sound_temperature out"):
        small_model().generate(CAPTIONS[0], sampling=replace(FAST, sound_temperature=1.0))


# ---------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("name", LOUD)
def test_generation_continues_what_training_saw(model, clip, name):
    """Greedy generation of cached parts is the most probable of one uncached pass over the whole sequence."""
    states: list[torch.Tensor] = []
    hook = model.lm.transformer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[1].ids))
    model.generate(split(name, clip), name, Sampling(temperature=0, decoding=OneByOne()))
    hook.remove()
    last = max(i for i, ids in enumerate(states) if ids.shape[1] > 1)  # where the last part begins, after all others
    tokens, whole = torch.cat(states[last:], 1), packed(model, name, clip)
    assert tokens.shape[1] == whole.length - 1 and torch.equal(tokens[:, : whole.prefix], whole.ids[:, : whole.prefix])
    hidden = model.lm(whole.replace(ids=torch.cat([tokens, whole.ids[:, -1:]], 1)))
    parts = (model.lm.head.visual, *model.lm.head.sound)
    for column in whole.loss[0, :-1].nonzero()[:, 0].tolist():
        part = next(part for part in parts if 0 <= int(whole.ids[0, column]) - part.offset < part.size)
        best = part.sample(hidden[:, column - 1], lambda scores: scores.argmax(-1))
        assert torch.equal(best, tokens[:, column]), column


@pytest.mark.parametrize("name", LOUD)
def test_every_task_makes_clips_with_sound(model, clip, name):
    calls = []
    made = model.generate(split(name, clip), name, seed=1, progress=lambda *count: calls.append(count))
    assert made.video.shape == clip.video.shape and made.audio.shape == clip.audio.shape and made.audio_rate == RATE
    assert made.audio.abs().max() <= 1 and made.audio.isfinite().all()
    asked = {"v2a": 36, "a2v": 12, "t2av": 48, "av_continuation": 4 + 16}[name]
    assert calls[-1] == (asked, asked) and calls == sorted(set(calls))
    assert torch.equal(made.video, clip.video) == (name == "v2a")
    assert torch.equal(made.audio, clip.audio) == (name == "a2v")
    again = model.generate(split(name, clip), name, seed=1)
    assert torch.equal(again.audio, made.audio) and torch.equal(again.video, made.video)


@pytest.mark.parametrize("decoding", [OneByOne(), Jacobi(4), Diagonal()], ids=str)
def test_an_interrupted_clip_goes_on_in_its_video_or_its_sound(model, clip, decoding):
    sampling, given, made = Sampling(temperature=0.8, decoding=decoding), split("av_continuation", clip), []
    whole = model.generate(given, "av_continuation", sampling, seed=1, made=made)
    ids = torch.cat(made, 1)
    assert ids.shape == (2, 4 + 16)
    for count in (3, 4, 9, 17):
        again = [ids[:, :count]]
        clip_again = model.generate(given, "av_continuation", sampling, seed=1, made=again)
        assert torch.equal(torch.cat(again, 1), ids)
        torch.testing.assert_close(clip_again.audio, whole.audio, rtol=0, atol=1e-5)


def test_known_sound_comes_back_as_its_own_tokens(model, clip):
    made = model.generate(split("av_continuation", clip), "av_continuation")
    known = model.audio.decode(model.audio.encode(clip.audio[..., :10_000]))
    torch.testing.assert_close(made.audio[..., :10_000], known, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t2v", "a2v", "t2av", "av_continuation"])
def test_streamed_frames_are_those_of_the_whole_clip(model, clip, name):
    given, sampling = split(name, clip), replace(FAST, guidance=3.0)
    frames = torch.cat(list(model.stream(given, name, sampling, seed=5)), 2)
    torch.testing.assert_close(frames, model.generate(given, name, sampling, seed=5).video, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_does_not_depend_on_its_batch(model, clip, guidance):
    sampling = Sampling(temperature=0.8, guidance=guidance)
    together = model.generate(split("t2av", clip), "t2av", sampling, seed=3)
    alone = model.generate(split("t2av", clip[1]), "t2av", sampling, seed=4)
    torch.testing.assert_close(alone.audio[0], together.audio[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.video[0], together.video[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("decoding", [OneByOne(), Jacobi()])
def test_levels_of_sound_are_drawn_each_by_itself(decoding):
    model = sounding_model()
    for level in model.lm.head.sound:  # so that every code is as probable, whatever the levels before
        torch.nn.init.zeros_(level.scores.weight)
    given = Given(SHAPE, CAPTIONS[:1] * 40, asks=("video", "audio"), fps=8.0)
    _, sound = model.draw(given, "t2av", Sampling(guidance=1.0, decoding=decoding), seed=3)
    alike = (sound[..., 0] == sound[..., 1]).double().mean().item()
    assert abs(alike - 1 / CODES) < 4 * (1 / CODES * (1 - 1 / CODES) / sound[..., 0].numel()) ** 0.5


def test_sound_has_a_temperature_of_its_own(model, clip):
    given, told = split("t2av", clip), split("v2a", clip)
    plain, greedy = Sampling(guidance=2.0), Sampling(guidance=2.0, sound_temperature=0.0)
    first, second = (model.draw(given, "t2av", way, seed=3) for way in (plain, greedy))
    assert torch.equal(first[0].tokens, second[0].tokens) and not torch.equal(first[1], second[1])
    own = [model.draw(told, "v2a", way, seed=5)[1] for way in (greedy, Sampling(temperature=0.0, guidance=2.0))]
    assert torch.equal(*own)
    with pytest.raises(ValueError, match="sound_temperature is a number from 0 on; got -1"):
        Sampling(sound_temperature=-1)


def test_sound_is_made_in_pieces_where_memory_runs_out(model, clip, monkeypatch):
    given, real = split("t2av", clip), model.audio.decode_latents
    whole = model.generate(given, "t2av", seed=1)

    def decode_latents(latents, past=None):
        if latents.shape[2] > 5:
            raise torch.OutOfMemoryError
        return real(latents, past)

    monkeypatch.setattr(model.audio, "decode_latents", decode_latents)
    torch.testing.assert_close(model.generate(given, "t2av", seed=1).audio, whole.audio, rtol=0, atol=1e-6)


def test_a_saved_model_sounds_the_same(model, box, clip, tmp_path):
    loaded = VideoLM.from_pretrained(box)
    for name in LOUD:
        one, other = (each.generate(split(name, clip), name, seed=2) for each in (model, loaded))
        assert torch.equal(one.audio, other.audio) and torch.equal(one.video, other.video)
    config = json.loads((box / "config.json").read_text())
    assert config["audio"] == store.fingerprint(model.audio)
    (tmp_path / "config.json").write_text(json.dumps({**config, "audio": "0" * 16}))
    for part in ("tokenizer", "audio", "lm", "text.model"):
        (tmp_path / part).symlink_to(box / part)
    with pytest.raises(ValueError, match="another tokenizer than .*/audio"):
        VideoLM.from_pretrained(tmp_path)
