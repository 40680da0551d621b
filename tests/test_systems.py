"""Each system of the literature that a file of conf/system/ composes learns and makes clips, at toy size."""

import functools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from reelm.data.clip import Clip
from reelm.engine.video_lm import VideoLM
from reelm.lm import layouts
from reelm.lm.decoding import generate
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling
from reelm.lm.pixelcnn import PixelCNN
from reelm.lm.sampling import Sampling
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import SPECIAL, Vocabulary
from reelm.scripts.common import check
from reelm.tasks.task import tasks_of
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.palette import Colours, Palette
from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.text import SentencePieceText

SYSTEMS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/system").glob("*.yaml"))
PIXELS = ("igpt", "pixelcnn")
TINY = {
    "magvit": ["head.codes.bits=[4,4]"],
    "pixelcnn": ["lm=pixelcnn", "lm.width=16", "lm.depth=2", "lm.kernel=[2,3,3]"],
}


@pytest.fixture(scope="module")
def text() -> SentencePieceText:
    return SentencePieceText.train([f"a red star moves left {i}" for i in range(40)], 400)


@functools.cache
def composed(name: str):
    GlobalHydra.instance().clear()
    with initialize_config_module("reelm.conf", version_base=None):
        return compose("train", [f"system={name}", *TINY.get(name, ()), *([] if name == "pixelcnn" else ["lm=tiny"])])


def system(name: str, text: SentencePieceText) -> VideoLM:
    torch.manual_seed(0)
    cfg = composed(name)
    if name in PIXELS:
        tokenizer, shape = Palette(Colours(8)), (2, 4, 4)
    else:
        tokenizer = MAGVIT2(
            LFQ(8), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3),) * 2
        )
        shape = (9, 16, 16)
    vocabulary, transformer = Vocabulary(visual=tokenizer.vocabulary, text=text.vocabulary), instantiate(cfg.lm)
    lm = LanguageModel(transformer, instantiate(cfg.head)(vocabulary=vocabulary, width=transformer.width))
    tasks = {task.name: task for task in tasks_of(instantiate(cfg.task)) if not task.controls}
    return VideoLM(tokenizer, text, lm, tasks, shape, 8.0, instantiate(cfg.sampler))


def clip(model: VideoLM, frames: int | None) -> Clip:
    g = torch.Generator().manual_seed(1)
    video = torch.rand(2, 3, frames or model.shape[0], *model.shape[1:], generator=g) * 2 - 1
    return Clip(video, 8.0, ("a red star moves left", "a red star"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_learns_and_makes_clips(name, text):
    model = system(name, text)
    optimizer = torch.optim.AdamW(model.lm.parameters(), 1e-3)
    for task in model.tasks.values():
        given, target = task.split(clip(model, task.frames), torch.Generator().manual_seed(0))
        sequence = model.packer.pack(given, task.marker, model.tokenizer.encode(target.video))
        losses = []
        for _ in range(2):
            torch.manual_seed(0)  # the same tokens hidden twice
            loss, _ = model.lm.train().loss(sequence)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[1] < losses[0]
    model.lm.eval()
    fast = {"steps": 2} if isinstance(model.sampling, MaskedSampling) else {}
    for task in model.tasks.values():
        given, target = task.split(clip(model, task.frames), torch.Generator().manual_seed(0))
        made = model.generate(given, task.name, type(model.sampling)(guidance=1.0, **fast))
        assert made.video.shape == target.video.shape


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_trains_its_tokenizer_too(name):
    check("train", [f"system={name}", "stage=tokenizer"])
    cfg = composed(name)
    with torch.device("meta"):
        tokenizer = instantiate(cfg.tokenizer)
    frames, size = cfg.data.train.frames, cfg.data.train.size
    assert tokenizer.grid(frames, size, size) and (tokenizer.vocabulary == 512 or name not in PIXELS)


def test_systems_are_what_they_are_named_for(text):
    expected = {
        "godiva": layouts.Axial(), "nuwa": layouts.Nearby((5, 3, 3)), "genie": layouts.SpaceTime(),
        "cogvideo": layouts.DualChannel(4), "videogpt": None,
    }  # fmt: skip
    for name, layout in expected.items():
        assert system(name, text).lm.transformer.layout == layout
    genie = system("genie", text)
    assert genie.sampling.by_frame and isinstance(genie.lm.head, Masked) and genie.lm.head.least == 0.5
    phenaki = system("phenaki", text)
    assert phenaki.lm.transformer.cross_attention and phenaki.lm.head.schedule == "uniform"
    assert {"continuation", "rewind", "interpolation"} <= set(system("mmvg", text).tasks)


def test_genie_frames_that_are_made_do_not_depend_on_those_to_come(text):
    model = system("genie", text).eval()
    for parameter in model.lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    task = model.task("i2v")
    short, long = (task.split(clip(model, n))[0] for n in (5, 9))
    sampling = MaskedSampling(steps=2, by_frame=True)
    short = short.replace(video=long.video[:, :, :5], known=long.known[:, :, :5])
    a, b = (model.generate(given, "i2v", sampling, seed=3).video for given in (short, long))
    torch.testing.assert_close(a, b[:, :, :5])


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_depend_on_earlier_ones_alone_and_are_learnt(name, text):
    model = system(name, text)
    lm, task = model.lm, model.task("t2v")
    target = clip(model, 2)
    target = target.replace(video=torch.linspace(-1, 1, 4).expand(2, 3, 2, 4, 4))  # a gradient along each row
    sequence = model.packer.pack(task.split(target)[0], 0, model.tokenizer.encode(target.video))
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    bits = []
    for _ in range(30):
        loss, metrics = lm.loss(sequence)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bits.append(float(metrics["nll"]) / torch.log(torch.tensor(2.0)) / 3)  # of each of a pixel's dimensions
    assert bits[0] <= 1.01 and bits[-1] < 0.1 * bits[0]  # log2(8) / 3 at first
    x = lm.head.vectors(sequence).detach().requires_grad_()
    y = lm.transformer(x, sequence)[0]
    start = sequence.prefix
    for column in range(start - 1, sequence.length):
        slopes = torch.autograd.grad(y[column].sum(), x, retain_graph=True)[0][0].abs().sum(-1)
        assert not slopes[max(column + 1, start) :].any() and slopes[: column + 1].any()


def test_pixelcnn_with_a_cache_equals_the_whole_and_sees_its_neighbourhood():
    torch.manual_seed(0)
    vocabulary = Vocabulary(visual=8, text=8)
    lm = LanguageModel(PixelCNN(16, 2, (2, 3, 3)), Categorical(vocabulary, 16)).eval()
    for weight in (lm.head.scores.weight, lm.head.table.weight, lm.head.others.weight):
        torch.nn.init.normal_(weight)
    places = [(-2, 0, 0), (-2, 1, 0)] + [(t, r, c) for t in range(2) for r in range(3) for c in range(4)]
    where = torch.tensor(places)
    prompt = Sequence(torch.tensor([[1, 3, SPECIAL + 2]] * 2), where[:3].expand(2, -1, -1), 3)
    ids = generate(lm.transformer, lm.head, prompt, where[3:], Sampling(0.0))
    whole = Sequence(torch.cat([prompt.ids, ids], 1), where.expand(2, -1, -1), 3)
    again = lm.head.logits(lm(whole))[0].argmax(-1) + SPECIAL
    assert torch.equal(again[:, 2:-1], ids) and len(ids.unique()) > 2
    x = torch.randn(1, len(places), 16, requires_grad=True)
    one = PixelCNN(16, 0, (2, 3, 3))
    y = one(x, whole[:1])[0]
    column = 2 + 12 + 5  # predicts (1, 1, 2)
    seen = torch.autograd.grad(y[column].sum(), x)[0][0, 2:].abs().sum(-1).nonzero()[:, 0].tolist()
    near = {(t, r, c) for t in (0, 1) for r in (0, 1, 2) for c in (1, 2, 3) if (t, r, c) < (1, 1, 2)}
    assert {places[2 + i] for i in seen} == near
    with pytest.raises(ValueError, match="the last two odd"):
        PixelCNN(16, 1, (2, 4, 3))


def test_a_palette_moves_to_the_colours_there_are():
    torch.manual_seed(0)
    tokenizer = Palette(Colours(6))
    wanted = torch.tensor([[-0.9, -0.9, -0.9], [0.9, 0.1, -0.5], [0.0, 0.8, 0.3], [-0.4, 0.2, 0.9]])
    video = wanted[torch.randint(0, 4, (2, 3, 8, 8))].movedim(-1, 1)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 0.05)
    for _ in range(150):
        made, _, losses = tokenizer(video)
        (5 * (made - video).square().mean() + 0.25 * losses["commitment"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.eval()
    ids = tokenizer.encode(video)
    assert ids.shape == (2, 3, 8, 8) and tokenizer.vocabulary == 6
    torch.testing.assert_close(tokenizer.decode(ids), video, atol=0.02, rtol=0)
    assert torch.equal(tokenizer.encode(video[:, :, :1]), ids[:, :1])
    with pytest.raises(ValueError, match="1 colour or more"):
        Colours(0)
