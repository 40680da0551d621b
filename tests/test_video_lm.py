import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.engine.loading import load
from reelm.engine.video_lm import VideoLM
from reelm.lm.decoding import OneByOne
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.parallel import Diagonal
from reelm.lm.sampling import Sampling
from reelm.lm.speculative import Jacobi
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.lm.weighting import Weighting
from reelm.tasks.formats import Format, Formats
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.painting import Painting
from reelm.tasks.task import Given
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.text import SentencePieceText, T5Text

PROMPTS = ["a red star moves left", "a blue circle", "a green heart"]
SHAPE = (9, 16, 16)
TASKS = [Generation(), KnownFrames("i2v"), KnownFrames("interpolation", last=1), Painting("inpainting", True, 1)]


@pytest.fixture(scope="module")
def model() -> VideoLM:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(
        LFQ(6), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    )
    text = SentencePieceText.train([f"{prompt} {i}" for prompt in PROMPTS for i in range(20)], 400)
    vocabulary = Vocabulary(visual=64, text=text.vocabulary)
    lm = LanguageModel(Transformer(32, depth=2, heads=2, sites=(8, 8, 8)), Categorical(vocabulary, 32))
    for parameter in lm.parameters():  # a fresh model sees no context and predicts nothing
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(lm.head.others.weight)
    tasks = {task.name: task for task in TASKS}
    return VideoLM(tokenizer, text, lm, tasks, SHAPE, 5.0, Sampling(temperature=0.8)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path, notes={"step": 7})
    return path


def video(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, *SHAPE) * 2 - 1


def known_first(pixels: torch.Tensor, frames: int = 5) -> Given:
    known = torch.zeros(len(pixels), 1, *SHAPE, dtype=torch.bool)
    known[:, :, :frames] = True
    return Given(SHAPE, tuple(PROMPTS[: len(pixels)]), pixels * known, known, fps=5.0)


def test_a_prompt_becomes_a_clip(model):
    clip = model.generate(PROMPTS[0], seed=3)
    assert clip.video.shape == (1, 3, *SHAPE) and clip.video.abs().max() <= 1 and clip.video.isfinite().all()
    assert clip.captions == (PROMPTS[0],) and clip.fps == 5.0
    assert torch.equal(model.generate(PROMPTS[0], seed=3).video, clip.video)
    assert not torch.equal(model.generate(PROMPTS[0], seed=4).video, clip.video)
    assert not torch.equal(model.generate(PROMPTS[1], seed=3).video, clip.video)


def test_a_saved_model_generates_the_same(model, folder):
    loaded = VideoLM.from_pretrained(folder)
    assert (loaded.shape, loaded.fps, loaded.sampling) == (SHAPE, 5.0, model.sampling)
    assert list(loaded.tasks) == [task.name for task in TASKS] and not loaded.training
    assert torch.equal(loaded.generate(PROMPTS, seed=1).video, model.generate(PROMPTS, seed=1).video)
    given = known_first(video())
    assert torch.equal(loaded.generate(given, "i2v").video, model.generate(given, "i2v").video)
    assert json.loads((folder / "config.json").read_text())["notes"] == {"step": 7}


def test_formats_are_part_of_a_saved_model(model, folder, tmp_path):
    formats = Formats((Format(9, (16, 16), 5.0), Format(5, (16, 24), 10.0, weight=0.5)))
    several = VideoLM(model.tokenizer, model.text, model.lm, model.tasks, formats=formats)
    assert (several.shape, several.fps) == (SHAPE, 5.0)
    several.save_pretrained(tmp_path / "model")
    again = VideoLM.from_pretrained(tmp_path / "model")
    assert again.formats == again.packer.formats == formats
    wide = Given((5, 16, 24), (PROMPTS[0],), fps=10.0)
    assert torch.equal(again.generate(wide).video, several.eval().generate(wide).video)
    assert not torch.equal(several.generate(PROMPTS[0]).video, model.generate(PROMPTS[0]).video)
    # a model that is told none stays as it was
    assert "formats" not in json.loads((folder / "config.json").read_text())
    assert VideoLM.from_pretrained(folder).packer.formats is None


def test_the_model_of_the_box_is_told_no_format():
    boxed = load("zoetrope")
    if boxed.formats is None:
        ids = boxed.packer.pack(Given(boxed.shape, ("a red star",), fps=boxed.fps), 0).ids[0]
        text = boxed.packer.text_length("a red star")
        assert len(ids) == 3 + text + 2 and ids[:3].tolist() == [1, 32, 3] and ids[-2:].tolist() == [4, 11]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_rounded_model_keeps_its_tokenizer_and_is_saved_as_the_same_again(model, dtype, tmp_path):
    model.save_pretrained(tmp_path / "a", dtype)
    loaded = VideoLM.from_pretrained(tmp_path / "a")
    pixels = video()
    assert torch.equal(loaded.tokenizer.encode(pixels), model.tokenizer.encode(pixels))
    loaded.save_pretrained(tmp_path / "b", dtype)
    again = VideoLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again.generate(PROMPTS).video, loaded.generate(PROMPTS).video)


def test_another_tokenizer_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "tokenizer" / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder."))
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, copy / "tokenizer" / "model.safetensors")
    with pytest.raises(ValueError, match="trained on tokens of another tokenizer") as error:
        VideoLM.from_pretrained(copy)
    assert "\n" not in str(error.value)


def test_broken_folders_are_refused_in_one_line(folder, tmp_path):
    def refused(match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match) as caught:
            load(copy)
        assert "\n" not in str(caught.value)

    copy = tmp_path / "absent"
    refused("no model .*absent: give a folder or one of the box", FileNotFoundError)
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    for change in ({"fps": None}, {"sampling": {"warmth": 1}}, {"shape": 3}):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        refused("does not describe a video language model")
    stranger = {"t2v": {"_target_": "os.system", "command": "x"}}
    (copy / "config.json").write_text(json.dumps({**config, "tasks": stranger}))
    refused("config names os.system")
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "text.model").write_bytes(b"nothing")
    refused("not a sentencepiece model")
    (copy / "text.model").unlink()
    refused("no text model", FileNotFoundError)


def test_an_unknown_task_is_named(model):
    with pytest.raises(ValueError, match="no task 'dance'; it was trained for t2v, i2v, interpolation, inpainting"):
        model.generate(PROMPTS[0], task="dance")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_does_not_depend_on_its_batch(model, guidance):
    sampling = Sampling(temperature=0.8, top_k=20, guidance=guidance)
    together = model.generate(PROMPTS, sampling=sampling, seed=5)
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, sampling=sampling, seed=5 + i).video[0]
        torch.testing.assert_close(alone, together.video[i], rtol=0, atol=1e-4)  # one other token: 0.1 and more


def test_guidance(model):
    def made(prompts, scale: float) -> torch.Tensor:
        return model.generate(prompts, sampling=Sampling(guidance=scale), seed=2).video

    rows = []
    hook = model.lm.transformer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    plain = made(PROMPTS, 1.0)
    assert set(rows) == {3}  # without guidance nothing is computed twice
    rows.clear()
    strong = made(PROMPTS, 4.0)
    assert set(rows) == {6}
    hook.remove()
    assert not torch.equal(plain, strong)
    # scale 0 leaves the prompt out
    torch.testing.assert_close(made(PROMPTS, 0.0), made([""] * 3, 1.0), rtol=0, atol=1e-4)


def test_without_a_prompt_nothing_is_guided(model, monkeypatch):
    rows, forward = [], model.lm.transformer.forward
    monkeypatch.setattr(model.lm.transformer, "forward", lambda x, *rest: rows.append(len(x)) or forward(x, *rest))
    guided, plain = Sampling(guidance=3.0), Sampling(guidance=1.0)
    for prompt, copies in (("", 1), ("a red star", 2)):
        rows.clear()
        made = model.generate(prompt, sampling=guided).video
        assert set(rows) == {copies} and (torch.equal(made, model.generate(prompt, sampling=plain).video)) == (
            not prompt
        )


def test_known_frames_come_back_as_their_own_tokens(model):
    pixels = video(2)
    clip = model.generate(known_first(pixels), "i2v", seed=1)
    known = model.tokenizer.encode(pixels[:, :, :5])
    torch.testing.assert_close(clip.video[:, :, :5], model.tokenizer.decode(known), rtol=0, atol=1e-5)
    assert clip.video.shape == (2, 3, *SHAPE)
    other = model.generate(known_first(pixels), "i2v", seed=2)
    torch.testing.assert_close(other.video[:, :, :5], clip.video[:, :, :5], rtol=0, atol=1e-5)
    assert not torch.equal(other.video, clip.video)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_every_task_generates(model, task):
    from reelm.data.clip import Clip

    given, _ = task.split(Clip(video(2), fps=5.0, captions=tuple(PROMPTS[:2])), torch.Generator().manual_seed(0))
    calls = []
    clip = model.generate(given, task.name, progress=lambda made, asked: calls.append((made, asked)))
    assert clip.video.shape == (2, 3, *SHAPE)
    asked = 12 - 4 * (given.leading > 0)  # a grid of 3 x 2 x 2
    assert calls[-1] == (asked, asked) and calls == sorted(set(calls))


@pytest.mark.parametrize("decoding", [OneByOne(), Jacobi(5), Diagonal()], ids=str)
def test_a_stream_gives_the_frames_of_the_clip_as_soon_as_their_tokens_exist(model, decoding):
    sampling = Sampling(temperature=0.8, decoding=decoding)
    for given, task in ((PROMPTS, "t2v"), (known_first(video(2)), "i2v")):
        count, pieces = [0], []

        def progress(made: int, _: int, count: list[int] = count) -> None:
            count[0] = made

        for piece in model.stream(given, task, sampling, seed=1, progress=progress):
            pieces.append((piece, count[0]))
        whole = model.generate(given, task, sampling, seed=1).video
        assert torch.equal(torch.cat([piece for piece, _ in pieces], 2), whole)
        first = pieces[0][0].shape[2]
        assert (first, pieces[0][1]) == (5, 0) if task == "i2v" else (first == 1 and 4 <= pieces[0][1] <= 8)


def test_a_way_of_decoding_is_saved(model, tmp_path):
    other = VideoLM(model.tokenizer, model.text, model.lm, model.tasks, SHAPE, sampling=Sampling(decoding=Jacobi(5)))
    other.save_pretrained(tmp_path / "model")
    assert VideoLM.from_pretrained(tmp_path / "model").sampling == other.sampling


def test_an_image_is_generated(model):
    clip = model.generate(Given((1, 16, 16), ("a red star",)))
    assert clip.video.shape == (1, 3, 1, 16, 16)


def test_generation_leaves_the_global_chance_alone(model):
    state = torch.get_rng_state()
    model.generate(PROMPTS[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_of_a_t5_encoder_the_place_is_kept(model, t5_folder, tmp_path):
    vocabulary = Vocabulary(visual=model.tokenizer.vocabulary)
    lm = LanguageModel(Transformer(32, 1, 2, context_width=32), Categorical(vocabulary, 32)).eval()
    VideoLM(model.tokenizer, T5Text(t5_folder), lm, model.tasks, SHAPE).save_pretrained(tmp_path / "model")
    again = VideoLM.from_pretrained(tmp_path / "model")
    assert again.generate("a red star").video.shape[2:] == SHAPE and not (tmp_path / "model/text.model").exists()
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["t5"]["path"] = "nowhere"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="no config.json in nowhere; T5Text takes a local folder"):
        VideoLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighting", [Weighting((2.0, 9.0)), Weighting(prompt=50.0)], ids=["frames", "prompt"])
def test_weights_reach_the_loss_and_not_what_is_logged(model, packed, weighting):
    clip = Clip(video(2), 5.0, captions=tuple(PROMPTS[:2]))
    plain, logged = model.loss(clip, "t2v", packed=packed)
    weighted, also = model.loss(clip, "t2v", packed=packed, weighting=weighting)
    assert abs(float(weighted.detach() - plain.detach())) > 1e-4
    torch.testing.assert_close(also["nll"], logged["nll"])
    nothing = model.loss(clip, "t2v", packed=packed, weighting=Weighting())[0]
    torch.testing.assert_close(nothing, plain)


def test_what_orders_batches_is_small_enough_to_be_sent(model):
    length = pickle.loads(pickle.dumps(model.packer.text_length))
    assert all(length(prompt) == model.packer.slots([prompt]) for prompt in PROMPTS) and length("") == 8
    assert len(pickle.dumps(model.packer.text_length)) < 2 * len(model.text.model) + 2000
