"""Each system of the literature that a file of conf/system/ composes learns and makes clips, at toy size.

What single systems are named for is checked here, in test_layouts.py (GODIVA, NUWA, CogVideo's gate), test_hierarchy.py
(CogVideo's stages), test_latent_actions.py (Genie), test_cross_attention.py (Phenaki) and test_audio_tokenizer.py.
"""

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
from reelm.lm.audio_visual import AudioVisual
from reelm.lm.decoding import generate
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.pixelcnn import PixelCNN
from reelm.lm.sampling import Sampling
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import SPECIAL, Special, Vocabulary, task_token
from reelm.scripts.common import check
from reelm.tasks.formats import Format, Formats
from reelm.tasks.task import Given, tasks_of
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.palette import Colours, Palette
from reelm.tokenizers.quantizers import LFQ, ResidualVQ
from reelm.tokenizers.text import SentencePieceText
from reelm.tokenizers.tokens import Tokens

SYSTEMS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf/system").glob("*.yaml"))
PIXELS = ("igpt", "pixelcnn")
TINY = {
    "magvit": ["head.codes.bits=[4,4]"],
    "genie": ["head.actions=4", "latent_actions=tiny", "latent_actions.stride=4"],
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
    formats = Formats((Format(9, (16, 16), 8.0), Format(9, (16, 16), 4.0))) if cfg.get("formats") else None
    actions = instantiate(cfg.latent_actions) if name == "genie" else None
    return VideoLM(tokenizer, text, lm, tasks, shape, 8.0, instantiate(cfg.sampler), formats, actions=actions)


def awake(lm: LanguageModel) -> LanguageModel:
    """A fresh model sees no context and predicts nothing."""
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return lm.eval()


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
        if model.actions is not None:
            given = given.replace(actions=model.actions.encode(target.video))
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
    assert genie.lm.head.actions == genie.actions.codes == 4
    assert genie.sampling.by_frame and isinstance(genie.lm.head, Masked) and genie.lm.head.least == 0.5
    phenaki = system("phenaki", text)
    assert phenaki.lm.transformer.cross_attention and phenaki.lm.head.schedule == "uniform"
    assert {"continuation", "rewind", "interpolation"} <= set(system("mmvg", text).tasks)
    assert {"t2v", "key_frames"} == set(system("cogvideo", text).tasks)
    assert [part.fps for part in composed("cogvideo").stage.formats] == [8, 4, 2]
    assert composed("videopoet").stage.formats is None


def test_genie_frames_that_are_made_do_not_depend_on_those_to_come(text):
    model = system("genie", text).eval()
    awake(model.lm)
    task = model.task("i2v")
    short, long = (task.split(clip(model, n))[0] for n in (5, 9))
    sampling = MaskedSampling(steps=2, by_frame=True)
    short = short.replace(video=long.video[:, :, :5], known=long.known[:, :, :5], actions=torch.tensor([[1], [3]]))
    long = long.replace(actions=torch.tensor([[1, 2], [3, 0]]))
    a, b = (model.generate(given, "i2v", sampling, seed=3).video for given in (short, long))
    torch.testing.assert_close(a, b[:, :, :5])


@pytest.mark.parametrize("name", ["videopoet", "videogpt", "godiva", "nuwa", "cogvideo"])
def test_sampling_with_a_cache_equals_the_argmax_of_the_whole(name, text):
    model = system(name, text)
    lm, where = awake(model.lm), Tokens.positions((3, 2, 2))
    for block in lm.transformer.blocks:
        if hasattr(block, "gate"):
            torch.nn.init.constant_(block.gate, 0.5)
    for task in [task for task in model.tasks.values() if task.frames is None][:4]:
        given, _ = task.split(clip(model, None), torch.Generator().manual_seed(0))
        start = model.packer.pack(given, task.marker)
        todo = where[model.packer.known_in(start).shape[1] :]
        made = generate(lm.transformer, lm.head, start, todo, Sampling(0.0))
        whole = start.followed_by(made, todo)
        scores = lm.head.logits(lm(whole))[0][:, start.length - 1 : -1]
        assert torch.equal(scores.argmax(-1), lm.head.vocabulary.from_visual(made))


def loud_videopoet(text: SentencePieceText) -> tuple[VideoLM, Clip]:
    """VideoPoet with all tasks, sound among them, and two clips."""
    torch.manual_seed(0)
    GlobalHydra.instance().clear()
    with initialize_config_module("reelm.conf", version_base=None):
        cfg = compose("train", ["system=videopoet", "task=audio_visual", "lm=tiny"])
    video = MAGVIT2(
        LFQ(8), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3),) * 2
    )
    audio = SoundStream(ResidualVQ(8, 4, 2), widths=[8, 8], strides=[5], patch=200, dilations=[1]).eval()
    vocabulary, transformer = Vocabulary(256, 16, text.vocabulary), instantiate(cfg.lm)
    head = AudioVisual(vocabulary, 64, instantiate(cfg.head)(vocabulary=vocabulary, width=64), 2)
    tasks = {task.name: task for task in tasks_of(instantiate(cfg.task))}
    lm = LanguageModel(transformer, head)
    model = VideoLM(video, text, lm, tasks, (9, 16, 16), 8.0, audio=audio)
    g = torch.Generator().manual_seed(1)
    controls = {"depth": torch.rand(2, 1, 9, 16, 16, generator=g), "flow": torch.randn(2, 2, 9, 16, 16, generator=g)}
    sound = torch.rand(2, 2, 18_000, generator=g) - 0.5
    return model, clip(model, None).replace(controls=controls, audio=sound, audio_rate=audio.rate)


def packed(model: VideoLM, task, whole: Clip) -> tuple[Sequence, Given, torch.Tensor | None, torch.Tensor | None]:
    """A task's sequence, what is given, and the tokens of video and of sound that it asks for."""
    whole = whole if task.frames is None else whole.replace(video=whole.video[:, :, : task.frames], audio=None)
    given, target = task.split(whole, torch.Generator().manual_seed(0))
    tokens = model.tokenizer.encode(target.video) if "video" in given.asks else None
    sound = model.packer.sound.encode(target.audio, target.audio_rate) if "audio" in given.asks else None
    return model.packer.pack(given, task.marker, tokens, sound=sound), given, tokens, sound


def test_videopoet_each_tasks_layout_goes_there_and_back(text):
    model, whole = loud_videopoet(text)
    vocabulary = model.lm.head.vocabulary
    assert len(model.tasks) == 16
    for name, task in model.tasks.items():
        sequence, given, tokens, sound = packed(model, task, whole)
        row, prompted = sequence.ids[0].tolist(), getattr(task, "prompted", True)
        pieces = [i - vocabulary.text_range.start for i in row if i in vocabulary.text_range]
        assert text.decode([pieces])[0] == (whole.captions[0] if prompted else ""), name
        assert int(task_token(task.marker)) in row[:2]
        if tokens is not None:
            begin = row.index(int(Special.bov_o)) + 1
            ids = sequence.ids[:, begin : begin + tokens[0].numel()]
            order = model.packer.order(given)
            assert torch.equal(vocabulary.from_visual(ids), tokens.flatten(1)[:, order]), name
            where = Tokens.positions(tuple(tokens.shape[1:]))[order]
            assert torch.equal(sequence.positions[0, begin : begin + len(where)], where)
        if sound is not None:
            begin = row.index(int(Special.boa_o)) + 1
            codes = model.packer.sound.codes(sequence.ids[:, begin:])
            assert torch.equal(codes, sound[:, -codes.shape[1] :]), name


@pytest.mark.slow
def test_videopoet_one_batch_with_every_task_is_learned_by_heart(text):
    model, whole = loud_videopoet(text)
    lm, sequences = model.lm.train(), [packed(model, task, whole)[0] for task in model.tasks.values()]
    optimizer = torch.optim.AdamW(lm.parameters(), 4e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, 240)
    for _ in range(240):
        losses = torch.stack([lm.loss(sequence)[0] for sequence in sequences])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        rate.step()
    # which of the two clips comes without a prompt cannot be known: log(2) over the tokens of a clip
    left = {name: float(loss) for name, loss in zip(model.tasks, losses, strict=True)}
    assert all(loss < 0.1 for loss in left.values()) and losses.mean() < 0.05, left


def test_phenaki_tokens_look_back_alone_and_a_picture_has_those_of_a_first_frame(text):
    cfg = composed("phenaki").tokenizer
    tokenizer = instantiate(cfg, width=16, heads=2, quantizer={"codes": 32})
    assert (tokenizer.layers, tokenizer.patch, tokenizer.quantizer.cosine) == ("sssstttt", (2, 8, 8), True)
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    tokenizer.train()(video)  # codes begin with what they see
    tokenizer.eval()
    ids, other = tokenizer.encode(video), video.clone()
    other[:, :, 3:] = torch.rand(2, 3, 2, 16, 16)
    assert ids.shape == (2, 3, 2, 2) and torch.equal(tokenizer.encode(other)[:, :2], ids[:, :2])
    assert torch.equal(tokenizer.encode(video[:, :, :1]), ids[:, :1])


def test_phenaki_prompts_change_along_a_clip_whose_last_tokens_are_kept(text):
    model = system("phenaki", text).eval()
    awake(model.lm)
    first = clip(model, None).replace(captions=("a red star", "a red star moves left"))
    given = model.task("continuation").split(first)[0]
    ids = {}
    for prompt in ("a red star", "moves left"):
        told = given.replace(captions=(prompt, prompt))
        made = model.generate(told, "continuation", MaskedSampling(steps=2, guidance=2.0), seed=1)
        ids[prompt] = made.video
        known = model.packer.prefix_frames(given)
        want = model.tokenizer.decode(model.tokenizer.encode(given.video[:, :, :known]))
        torch.testing.assert_close(made.video[:, :, :known], want, atol=1e-5, rtol=0)
    assert not torch.equal(ids["a red star"], ids["moves left"])


def test_videogpt_tokens_and_a_codebook_that_follows_them():
    cfg = composed("videogpt").tokenizer
    tokenizer = instantiate(cfg, channels=[8, 8, 8], blocks=[0, 0, 1], quantizer={"codes": 16, "dim": 8})
    assert tokenizer.compression == (4, 4, 4) and not [n for n, _ in tokenizer.quantizer.named_parameters()]
    video, errors = torch.rand(2, 3, 1, 1, 1).expand(2, 3, 5, 8, 8) * 2 - 1, []
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    made = tokenizer.train()(video)[0]
    before = tokenizer.quantizer.vq.codebooks.clone()
    for _ in range(20):
        made, _, losses = tokenizer(video)
        errors.append((made - video).square().mean())
        (errors[-1] + 0.25 * losses["commitment"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < 0.7 * errors[0] and not torch.equal(before, tokenizer.quantizer.vq.codebooks)


@pytest.mark.slow
def test_mmvg_one_model_goes_on_goes_back_and_fills_in_between(text):
    model = system("mmvg", text)
    whole = clip(model, None)
    tokens = model.tokenizer.encode(whole.video).flatten(1)
    names = ("continuation", "rewind", "interpolation")
    made = {}
    for name in names:
        given, _ = model.task(name).split(whole, torch.Generator().manual_seed(0))
        made[name] = given, model.packer.pack(given, 0, tokens.view(2, 3, 2, 2))
    optimizer = torch.optim.AdamW(model.lm.train().parameters(), 3e-3, weight_decay=0.0)
    for _ in range(100):
        sum(model.lm.loss(sequence)[0] for _, sequence in made.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.lm.eval()
    for name, (given, _) in made.items():
        start = model.packer.pack(given, 0)
        found = fill(model.lm.transformer, model.lm.head, start, MaskedSampling(steps=3, temperature=0.0, noise=0.0))
        ids = torch.cat([model.packer.known_in(start), found], 1)
        assert (model.lm.head.vocabulary.from_visual(ids) == tokens).float().mean() > 0.95, name


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
