import json
import shutil

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.reading import read_image
from reelm.data.writing import write_image
from reelm.diffusion.dit import DiT
from reelm.diffusion.model import Diffusion
from reelm.diffusion.objectives import Flow
from reelm.diffusion.solvers import Denoising
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs
from reelm.engine.job import Job, run_job
from reelm.engine.loading import load
from reelm.engine.store import describe
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.lm.sampling import Sampling
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tasks.task import Given
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import Continuous
from reelm.tokenizers.text import SentencePieceText

PROMPTS = ["a red star moves left", "a blue circle", "a green heart"]
SHAPE = (9, 16, 16)
TASKS = [
    Generation(), Generation("t2i", frames=1), KnownFrames("i2v"), KnownFrames("continuation", first=(5,)),
    KnownFrames("interpolation", last=1), Painting("inpainting", True, 1), Stylization(),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VideoDiffusion:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(
        Continuous(4), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1),
        kernels=((1, 3, 3), (3, 3, 3)),
    )  # fmt: skip
    text = SentencePieceText.train([f"{prompt} {i}" for prompt in PROMPTS for i in range(20)], 400)
    denoiser = DiT(4, 4, text.vocabulary, width=24, heads=2, layers="jj", text_depth=1)
    with torch.no_grad():  # a fresh model makes nothing of anything
        for weight in denoiser.parameters():
            if not weight.any():
                weight.normal_(std=0.3)
    tasks = {task.name: task for task in TASKS}
    diffusion = Diffusion(denoiser, Flow(shift=2.0))
    return VideoDiffusion(tokenizer, text, diffusion, tasks, SHAPE, 5.0, Denoising(4, guidance=2.0)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path, notes={"step": 7})
    return path


def video(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, *SHAPE) * 2 - 1


def test_a_prompt_becomes_a_clip(model):
    clip = model.generate(PROMPTS[0], seed=3)
    assert clip.video.shape == (1, 3, *SHAPE) and clip.video.abs().max() <= 1 and clip.fps == 5.0
    assert torch.equal(model.generate(PROMPTS[0], seed=3).video, clip.video)
    assert not torch.equal(model.generate(PROMPTS[0], seed=4).video, clip.video)
    assert not torch.equal(model.generate(PROMPTS[1], seed=3).video, clip.video)
    assert model.generate("a red star", "t2i").video.shape == (1, 3, 1, 16, 16)
    assert model.generate(Given((5, 8, 24), ("a red star",))).video.shape == (1, 3, 5, 8, 24)


def test_a_saved_model_is_found_and_generates_the_same(model, folder):
    loaded = load(folder)
    assert isinstance(loaded, VideoDiffusion) and not loaded.training
    assert (loaded.shape, loaded.fps, loaded.sampling) == (SHAPE, 5.0, model.sampling)
    assert loaded.diffusion.objective == model.diffusion.objective and list(loaded.tasks) == list(model.tasks)
    again, clip = loaded.generate(PROMPTS, seed=1), model.generate(PROMPTS, seed=1)
    torch.testing.assert_close(again.video, clip.video, rtol=0, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["notes"] == {"step": 7}


def test_a_folder_cannot_name_code(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "diffusion/config.json").read_text())
    config["model"]["denoiser"]["_target_"] = "os.system"
    (copy / "diffusion/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config names os.system"):
        load(copy)


def test_a_sample_does_not_depend_on_its_batch(model):
    together = model.generate(PROMPTS, seed=5)
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, seed=5 + i).video[0]
        torch.testing.assert_close(alone, together.video[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_every_task_generates(model, task):
    controls = {"depth": torch.rand(2, 1, *SHAPE), "flow": torch.randn(2, 2, *SHAPE)}
    whole = Clip(video(2), 5.0, tuple(PROMPTS[:2]), controls=controls)
    given, _ = task.split(whole, torch.Generator().manual_seed(0))
    calls = []
    clip = model.generate(given, task.name, progress=lambda step, steps: calls.append((step, steps)))
    assert clip.video.shape == (2, 3, *SHAPE) and calls == [(i, 4) for i in range(1, 5)]


def test_known_frames_come_back_as_their_own_latents(model):
    pixels, known = video(2), torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    known[:, :, :5] = True
    clip = model.generate(Given(SHAPE, tuple(PROMPTS[:2]), pixels * known, known), "continuation", seed=1)
    reconstruction = model.tokenizer.decode(model.tokenizer.encode(pixels[:, :, :5]))
    torch.testing.assert_close(clip.video[:, :, :5], reconstruction, rtol=0, atol=1e-5)


def test_known_pixels_stay_and_clips_of_any_length_are_made(model, tmp_path):
    write_image(tmp_path / "photo.png", Clip(video()[:, :, :1]))
    clip = make(model, "i2v", Inputs("a red star", image=str(tmp_path / "photo.png")), frames=13, samples=2)
    assert clip.video.shape == (2, 3, 13, 16, 16)
    first = read_image(str(tmp_path / "photo.png"), size=(16, 16)).video[:, :, 0]
    assert torch.equal(clip.video[:, :, 0], first.expand(2, -1, -1, -1))


def test_settings_change_the_model_s_own_way_to_sample(model, folder, tmp_path):
    assert model.sampling_with({"steps": 2}) == Denoising(2, guidance=2.0)
    for changes, message in (
        ({"top_k": 3}, "this model has no sampler.top_k; it has steps, solver, guidance"),
        ({"steps": "many"}, "sampler.steps is a whole number such as 4; got 'many'"),
        ({"solver": 3}, "sampler.solver is a word such as euler; got 3"),
        ({"solver": "rk4"}, "solver is one of euler, heun"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sampling_with(changes)
    job = Job(str(folder), None, Inputs("a red star"), str(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="this video diffusion model cannot sample by Sampling; leave sampler=... out"):
        run_job(job, Sampling(), {})
    run_job(job, {"steps": 3}, {})
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["sampling"] == describe(Denoising(3, guidance=2.0)) and record["diffusion_model"]
