"""What a user hands to generate, and what comes out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from reelm.data.clip import Clip
from reelm.data.reading import probe, read_video
from reelm.data.writing import write_image, write_video
from reelm.engine import job as job_file
from reelm.engine.chain import chain_of, make_chain
from reelm.engine.errors import one_line_errors
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs
from reelm.engine.interruption import keep_tokens, read_tokens
from reelm.engine.job import Job, run_job
from reelm.engine.video_lm import VideoLM
from reelm.lm.decoding import OneByOne, Run
from reelm.lm.heads import Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.parallel import Diagonal
from reelm.lm.sampling import Sampling
from reelm.lm.speculative import Jacobi
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.formats import Format, Formats
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames, Loop
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import FSQ
from reelm.tokenizers.text import SentencePieceText

FAST = Sampling(guidance=1.0)
TASKS = {
    task.name: task
    for task in (
        Generation("t2v"), Generation("t2i", frames=1), Generation("unconditional", prompted=False),
        KnownFrames("i2v"), KnownFrames("continuation", first=(5,)), KnownFrames("interpolation", last=1),
        KnownFrames("backward", first=(0,), last=5), KnownFrames("connection", first=(1,), last=1), Loop(),
        Painting("inpainting", inside=True, marker=1), Painting("outpainting", inside=False, marker=2), Stylization(),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VideoLM:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(FSQ((4, 4)), (16, 16), ((1, 2, 2),), (1, 1), ((1, 3, 3), (3, 3, 3)), (4, 4, 4))
    text = SentencePieceText.train(["a red star moves left", "a blue circle in neon style"] * 8, 400)
    lm = LanguageModel(Transformer(32, 1, 2, sites=(8, 8, 8)), Chained(Vocabulary(16, text=text.vocabulary), 32))
    return VideoLM(tokenizer, text, lm, TASKS, shape=(9, 32, 32), sampling=FAST).eval()


@pytest.fixture(scope="module")
def box(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("box") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A photo of odd size, a clip of another rate and shape, masks."""
    folder = tmp_path_factory.mktemp("material")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (77, 131, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    video = torch.linspace(-1, 1, 50).view(1, 1, 50, 1, 1).expand(1, 3, 50, 48, 80).contiguous()
    write_video(folder / "clip.mp4", Clip(video, 25.0))
    mask = np.zeros((48, 80), dtype=np.uint8)
    mask[10:30, 30:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "small.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    return folder


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


def test_a_chain_gives_each_task_what_the_one_before_made(model, material):
    photo = str(material / "photo.jpg")
    steps = chain_of(["i2v", {"task": "outpainting", "keep": 0.5}], Inputs("a star", image=photo))
    first = make(model, "i2v", Inputs("a star", image=photo), samples=2, seed=4)
    second = make(model, "outpainting", Inputs("a star", video=first, keep=0.5), samples=2, seed=4)
    chained = make_chain(model, steps, samples=2, seed=4)
    assert torch.equal(chained.video, second.video) and len(chained) == 2
    inner = torch.nn.functional.interpolate(first.video[0].transpose(0, 1), (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(chained.video[0, :, :, 8:24, 8:24], inner.transpose(0, 1).clamp(-1, 1))
    longer = chain_of(["t2i", "i2v", "stylization"], Inputs("a star"))
    assert make_chain(model, longer, frames=5).video.shape == (1, 3, 5, 32, 32)


@pytest.mark.parametrize(
    ("links", "inputs", "message"),
    [
        (["t2i", "t2v"], Inputs("x"), "task=t2v takes no clip, so it can only be the first of a chain"),
        (["t2v", "stylization"], Inputs("x", image="a"), "no task of chain=.* has a use for image="),
        (["i2v", "outpainting"], Inputs("x"), "task=i2v needs image=..."),
        (["t2v", {"task": "outpainting", "kep": 1}], Inputs("x"), "got one with kep"),
        ([{"prompt": "x"}], Inputs("x"), "got one with no task"),
        ("t2v", Inputs("x"), "chain=t2v is no list; write it as one"),
        ({"task": "t2v"}, Inputs("x"), "is no list; write it as one"),
        (["t2v", 3], Inputs("x"), "got 3"),
        (["t2v", ["i2v"]], Inputs("x"), "got .'i2v'."),
        (["t2v", "dance"], Inputs("x"), "chain has the task dance, which there is not; tasks are t2v"),
        (["t2v", {"task": "stylization", "prompt": 3}], Inputs("x"), "prompt=3 of stylization in chain is not a text"),
        (["t2v", {"task": "outpainting", "keep": "wide"}], Inputs("x"), "keep=wide of outpainting in chain is not a n"),
    ],
)
def test_chains_that_cannot_be_are_told_before_any_work(links, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        Job("nowhere", None, inputs, chain=links).steps()
    assert "\n" not in str(caught.value)


def test_one_says_a_task_or_a_chain():
    with pytest.raises(ValueError, match="both say what to do"):
        Job("nowhere", "t2v", Inputs("x"), chain=["t2v"]).steps()


@pytest.fixture(scope="module")
def several(model) -> VideoLM:
    """A model of two sizes, and of two lengths of the first."""
    formats = Formats((Format(9, (32, 32)), Format(17, (32, 32)), Format(9, (24, 40), 12.0)))
    return VideoLM(model.tokenizer, model.text, model.lm, TASKS, sampling=FAST, formats=formats).eval()


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


def test_a_job_leaves_a_clip_a_sheet_and_a_record(box, tmp_path, capsys):
    paths = run_job(Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), samples=2), FAST, {"seed": 0})
    assert [path.name for path in paths] == ["a_0.mp4", "a_1.mp4", "a.png"]
    assert abs(probe(paths[0]).duration - 9 / 8) < 0.01
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["prompt"] == "a red star" and record["task"] == "t2v" and record["seeds"] == [0, 1]
    assert len(record["language_model"]) == 16 and record["seconds"]["make"] > 0


@pytest.mark.parametrize("decoding", [OneByOne(), Jacobi(4), Diagonal()], ids=str)
def test_an_interrupted_job_keeps_its_tokens_and_goes_on_exactly(box, tmp_path, capsys, monkeypatch, decoding):
    sampling = Sampling(decoding=decoding)
    job = Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), frames=13, samples=2, dtype="float32")
    run_job(job, sampling, {})
    whole = [(tmp_path / f"a_{i}.mp4").read_bytes() for i in range(2)]
    passes, calls = json.loads((tmp_path / "a.json").read_text())["passes"], []

    def choose(run, *arguments, real=Run.choose):
        calls.append(1)
        if len(calls) == passes - 3:  # in the second window
            raise KeyboardInterrupt
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "choose", choose)
        patch.setattr("sys.argv", ["scripts/generate.py", "prompt='a red star'"])
        with pytest.raises(KeyboardInterrupt):
            run_job(replace(job, output=str(tmp_path / "b.mp4")), sampling, {})
    said, kept = capsys.readouterr().err.splitlines(), tmp_path / "b.tokens.safetensors"
    assert said[-1] == f"python scripts/generate.py 'prompt='\"'\"'a red star'\"'\"'' tokens={kept}"
    assert not (tmp_path / "b_0.mp4").exists() and "tokens of each clip are kept" in said[-2]
    run_job(replace(job, output=str(tmp_path / "b.mp4"), tokens=str(kept), dtype="auto"), sampling, {})
    assert [(tmp_path / f"b_{i}.mp4").read_bytes() for i in range(2)] == whole
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["passes"] < passes or isinstance(decoding, Diagonal)
    assert again["dtype"] == "float32"  # that of the tokens
    with pytest.raises(ValueError, match=r"were made with seeds \[0, 1\], not \[1, 2\]; give the same"):
        run_job(replace(job, tokens=str(kept), seed=1), sampling, {})
    kept.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a file of tokens"):
        run_job(replace(job, tokens=str(kept)), sampling, {})
    with pytest.raises(FileNotFoundError, match="tokens=... is what an interrupted call named"):
        run_job(replace(job, tokens=str(tmp_path / "nowhere")), sampling, {})


def test_an_interrupted_chain_goes_on_in_its_link(box, tmp_path, monkeypatch):
    chain = ["t2i", "i2v", {"task": "stylization", "prompt": "a blue circle"}]
    job = Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), samples=2, dtype="float32", chain=chain)
    run_job(job, FAST, {})
    passes, calls = json.loads((tmp_path / "a.json").read_text())["passes"], []

    def choose(run, *arguments, real=Run.choose):
        calls.append(1)
        if len(calls) == passes - 2:  # in the last link
            raise KeyboardInterrupt
        return real(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "choose", choose)
        run_job(replace(job, output=str(tmp_path / "b.mp4")), FAST, {})
    kept = tmp_path / "b.tokens.safetensors"
    run_job(replace(job, output=str(tmp_path / "b.mp4"), tokens=str(kept), dtype="auto"), FAST, {})
    for i in range(2):
        assert (tmp_path / f"a_{i}.mp4").read_bytes() == (tmp_path / f"b_{i}.mp4").read_bytes()
    assert json.loads((tmp_path / "b.json").read_text())["passes"] < passes
    with pytest.raises(ValueError, match="were made with task t2i,i2v,stylization, not t2i,i2v; give the same"):
        run_job(replace(job, tokens=str(kept), chain=chain[:2]), FAST, {})


def test_windows_without_tokens_keep_their_number(tmp_path):
    made, path = [[], [torch.ones(1, 3, dtype=torch.long)], []], tmp_path / "a.safetensors"
    keep_tokens(path, made, {}, "float32")
    dtype, again = read_tokens(path, {})
    assert dtype == "float32" and again[0] == [] and torch.equal(again[1][0], made[1][0]) and len(again) == 2


def test_before_the_first_token_nothing_is_kept(tmp_path, capsys):
    keep_tokens(tmp_path / "a.safetensors", [], {}, "float32")
    assert capsys.readouterr().err == "no tokens to be kept are made yet; the same command begins anew\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["decoding", "tokens", "writing"])
def test_tokens_outlive_memory_and_disk(box, tmp_path, capsys, monkeypatch, fault):
    job = Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), dtype="float32")
    run_job(job, FAST, {})
    whole, calls = (tmp_path / "a.mp4").read_bytes(), []

    def full(*arguments, **options):
        calls.append(1)
        if fault == "tokens" and len(calls) < 20:
            return choose(*arguments, **options)
        raise (
            OSError(28, "No space left on device", "b.mp4")
            if fault == "writing"
            else RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        )

    choose = Run.choose
    place = {"decoding": (MAGVIT2, "decode_latents"), "tokens": (Run, "choose"), "writing": (job_file, "write_video")}
    sampling = replace(FAST, decoding=OneByOne())
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(*place[fault], full)
        patch.setattr("sys.argv", ["scripts/generate.py", "prompt=x"])
        one_line_errors(run_job)(replace(job, output=str(tmp_path / "b.mp4")), sampling, {})
    kept, said = tmp_path / "b.tokens.safetensors", capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: ") and len(said) == 3
    assert said[-2] == f"python scripts/generate.py prompt=x tokens={kept}" and not (tmp_path / "b.mp4").exists()
    run_job(replace(job, output=str(tmp_path / "b.mp4"), tokens=str(kept)), sampling, {})
    assert (tmp_path / "b.mp4").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames=0; give a whole number from 1"),
        ({"frames": "two"}, "frames=two; give a whole number"),
        ({"frames": 17, "seconds": 2}, "frames=17 and seconds=2 both say how long"),
        ({"seconds": -1}, "seconds=-1; give a number above 0"),
        ({"seconds": float("inf")}, "seconds=inf; give"),
        ({"samples": 1.5}, "samples=1.5; give a whole number"),
        ({"samples": 0}, "samples=0; give"),
        ({"seed": 10**30}, "give a whole number from 0 to 281474976710655"),
        ({"fps": 0}, "fps=0; give a number above 0"),
        ({"fps": "fast"}, "fps=fast; give"),
        ({"size": 0}, "size=0; give .height,width. in pixels"),
        ({"size": [64]}, "size=.64.; give"),
        ({"size": "big"}, "size=big; give"),
    ],
)
def test_impossible_numbers_are_told_before_any_work(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Job("nowhere", None, Inputs("x"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"frames": 4 * 10**9 + 1}, {"seconds": 1e9}, {"samples": 10**9}])
def test_what_no_memory_holds_is_told_before_any_work(box, tmp_path, options):
    job = Job(str(box), None, Inputs("a star"), str(tmp_path / "a.mp4"), **options)
    with pytest.raises(ValueError, match="GB of memory, and this machine has .*; ask for fewer"):
        run_job(job, FAST, {})
    assert not list(tmp_path.iterdir())


def test_long_prompts_are_noted_once(box, tmp_path, capsys):
    run_job(Job(str(box), "t2i", Inputs("a red star " * 40), str(tmp_path / "a.png")), FAST, {})
    assert capsys.readouterr().err == "note: only the first 64 word pieces of a prompt are read; shorten it\n"


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


def test_nothing_is_written_where_nothing_can_be(box, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run_job(Job(str(box), None, Inputs("a star"), str(tmp_path / "file" / "a.mp4")), FAST, {})
    with pytest.raises(ValueError, match=r"ends in \.avi"):
        run_job(Job(str(box), None, Inputs("a star"), str(tmp_path / "a.avi")), FAST, {})
    with pytest.raises(FileNotFoundError, match="no model nothing"):
        run_job(Job("nothing", None, Inputs("a star"), str(tmp_path / "a.mp4")), FAST, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_write_image_takes_a_made_image(model, tmp_path):
    write_image(tmp_path / "a.png", make(model, "t2i", Inputs("a star")))
    assert Image.open(tmp_path / "a.png").size == (32, 32)


def test_a_result_is_not_written_over_what_it_is_made_of(box, tmp_path):
    write_video(tmp_path / "a.mp4", Clip(torch.zeros(1, 3, 9, 32, 32)))
    write_image(tmp_path / "a.png", Clip(torch.zeros(1, 3, 1, 32, 32)))
    before = (tmp_path / "a.mp4").read_bytes(), (tmp_path / "a.png").read_bytes()
    name = str(tmp_path / "a.mp4")
    for job in (
        Job(str(box), "continuation", Inputs(video=name), name),
        Job(str(box), "i2v", Inputs(image=str(tmp_path / "a.png")), name, samples=2),  # its sheet is a.png
        Job(
            str(box),
            None,
            Inputs(prompt="x", video=name),
            str(tmp_path / "sub" / ".." / "a.mp4"),
            chain=["stylization"],
        ),
    ):
        with pytest.raises(ValueError, match="would be written over (video|image)=.*a.(mp4|png); give another output"):
            run_job(job, FAST, {})
    assert ((tmp_path / "a.mp4").read_bytes(), (tmp_path / "a.png").read_bytes()) == before


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


def test_a_chain_starts_its_first_clip_alone_later(model, material):
    steps = chain_of(
        ["outpainting", {"task": "stylization", "prompt": "x"}], Inputs(video=str(material / "clip.mp4"), start=1.0)
    )
    assert [inputs.start for _, inputs in steps] == [1.0, 0.0]
    late = chain_of(["t2v", {"task": "stylization", "start": 9.0}], Inputs(prompt="x"))
    with pytest.raises(ValueError, match="start=9.0 lies after the end of the clip that was made before"):
        make_chain(model, late, sampling=FAST)


def test_a_chain_that_cannot_end_is_not_begun(model, monkeypatch):
    monkeypatch.setattr(model, "generate", None)  # a call would fail
    with pytest.raises(ValueError, match="task=stylization makes clips of up to 9 frames with this model; got 33"):
        make_chain(model, chain_of(["t2v", "stylization"], Inputs(prompt="x")), frames=33)
    with pytest.raises(ValueError, match="a2v in chain goes on from sound, and t2v before it makes none"):
        chain_of(["t2v", "a2v"], Inputs(prompt="x"))


@pytest.mark.parametrize(
    "job, message",
    [
        (lambda: Job("zoetrope", None, Inputs("x"), seed=None), "seed=None; give a whole number from 0"),
        (lambda: Job("zoetrope", None, Inputs("x"), samples=None), "samples=None; give a whole number from 1"),
        (lambda: Inputs("x", keep=None).check("t2v"), "keep=None is not a number"),
        (lambda: Inputs("x", start=None).check("t2v"), "start=None is not a number"),
    ],
)
def test_what_must_be_a_number_cannot_be_null(job, message):
    with pytest.raises(ValueError, match=message):
        job()


def test_settings_of_sampling_are_of_their_kind(model):
    with pytest.raises(ValueError, match="sampler.top_k is a whole number such as 0; got 2.5"):
        model.sampling_with({"top_k": 2.5})
    with pytest.raises(ValueError, match="ways to decode are chosen by sampler=jacobi"):
        model.sampling_with({"decoding": "jacobi"})
    assert model.sampling_with({"temperature": 0}).temperature == 0


def test_a_clip_with_sound_is_not_written_where_there_is_none(box, tmp_path):
    with pytest.raises(ValueError, match="task=t2av writes .mp4, .webm"):
        run_job(Job(str(box), "t2av", Inputs("x"), str(tmp_path / "a.gif")), FAST, {})
