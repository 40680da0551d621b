"""What must come out the same however it is computed, for every token head."""

from functools import cache, partial

import pytest
import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.engine import video_lm
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs
from reelm.engine.video_lm import VideoLM
from reelm.lm.audio_visual import AudioVisual
from reelm.lm.decoding import OneByOne
from reelm.lm.heads import Categorical, Chained, Factorized
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling
from reelm.lm.parallel import Blocks, Diagonal
from reelm.lm.pixelcnn import PixelCNN
from reelm.lm.sampling import Sampling
from reelm.lm.speculative import Jacobi
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.task import ORDERS, Given
from reelm.tasks.with_sound import WithSound
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ, Continuous, ResidualVQ
from reelm.tokenizers.text import SentencePieceText
from reelm.tokenizers.tokens import Tokens

SHAPE, TOKENS, SOUND = (9, 16, 16), 12, 2 * 9
PROMPTS = [  # of 8, 16, 8 and 24 text slots
    "a red star", "a red star moves left while a blue circle moves right", "a blue circle",
    "a red star moves left while a blue circle moves right while a red circle moves left and a star moves right",
]  # fmt: skip
CODES = {
    "categorical": Categorical,
    "factorized": partial(Factorized, bits=(3, 3)),
    "chained": partial(Chained, bits=(3, 3)),
}
KINDS = [*CODES, "sound", "masked", "per_token_diffusion"]
CACHED = [*CODES, "sound"]


def tokenizer(quantizer: nn.Module) -> MAGVIT2:
    return MAGVIT2(
        quantizer, patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    )


@cache
def model(kind: str, attention: str = "auto") -> VideoLM:
    torch.manual_seed(0)
    text = SentencePieceText.train([f"{prompt} {i}" for prompt in PROMPTS for i in range(10)], 400)
    audio = SoundStream(ResidualVQ(8, 4, 2), widths=[8, 8], strides=[5], patch=400, dilations=[1])
    visual = 0 if kind == "per_token_diffusion" else 64
    vocabulary = Vocabulary(visual, 16 if kind == "sound" else 0, text.vocabulary)
    codes = CODES.get(kind, CODES["chained"])
    head = {
        "per_token_diffusion": lambda: TokenDiffusion(vocabulary, 32, 4, hidden=16, depth=1, repeats=1),
        "masked": lambda: Masked(vocabulary, 32, codes(vocabulary, 32)),
        "sound": lambda: AudioVisual(vocabulary, 32, codes(vocabulary, 32), 2),
    }.get(kind, lambda: codes(vocabulary, 32))()
    sampling = {
        "per_token_diffusion": TokenDenoising(3, guidance=2.0),
        "masked": MaskedSampling(guidance=2.0, steps=3),
    }.get(kind, Sampling(temperature=0.8, guidance=2.0))
    lm = LanguageModel(Transformer(32, 1, 2, sites=(8, 8, 8), attention=attention), head)
    for weight in lm.parameters():  # a fresh model sees no context and predicts nothing
        if weight.ndim > 1 or not weight.any():
            nn.init.normal_(weight, std=0.3)
    video = tokenizer(Continuous(4) if kind == "per_token_diffusion" else LFQ(6))
    tasks = {task.name: task for task in (Generation(), KnownFrames("i2v"), WithSound("t2av"))}
    audio.eval().encode(torch.rand(4, 2, 18_000) - 0.5)  # the first sound makes its codes
    sound = {"audio": audio} if kind == "sound" else {}
    return VideoLM(video, text, lm, tasks, SHAPE, 8.0, sampling, **sound).eval()


def given(kind: str, prompts: list[str], pixels: torch.Tensor | None = None, frames: list[int] = ()) -> Given:
    asks = ("video", "audio") if kind == "sound" else ("video",)
    known = None
    if pixels is not None:
        known = torch.arange(SHAPE[0])[:, None, None] < torch.tensor(frames)[:, None, None, None, None]
        known = known.expand(-1, 1, *SHAPE)
        pixels = pixels * known
    return Given(SHAPE, tuple(prompts), pixels, known, asks=asks)


def same(one: Clip, other: Clip) -> None:
    torch.testing.assert_close(one.video, other.video, rtol=0, atol=1e-4)  # one other token: 0.1 and more
    if one.audio is not None:
        torch.testing.assert_close(one.audio, other.audio, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_four_gives_each_prompt_the_clip_it_gets_alone(kind):
    m = model(kind)
    assert [m.packer.text_length(prompt) for prompt in PROMPTS] == [8, 16, 8, 24]
    counts = []
    together = m.generate(given(kind, PROMPTS), seed=5, progress=lambda *count: counts.append(count))
    asked = TOKENS + SOUND * (kind == "sound")
    assert counts[-1] == (asked, asked) and counts == sorted(counts) and len(together) == 4
    assert together.captions == tuple(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        same(m.generate(given(kind, [prompt]), seed=5 + i), together[i])


@pytest.mark.parametrize("kind", ["chained", "masked", "per_token_diffusion"])
def test_neither_does_it_depend_on_how_much_is_known_of_its_neighbours(kind):
    m, pixels = model(kind), torch.rand(3, 3, *SHAPE) * 2 - 1
    prompts, frames = PROMPTS[:1] * 3, [5, 1, 5]
    together = m.generate(given(kind, prompts, pixels, frames), "i2v", seed=2)
    for i in range(3):
        alone = given(kind, prompts[:1], pixels[i : i + 1], frames[i : i + 1])
        same(m.generate(alone, "i2v", seed=2 + i), together[i])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_twice(kind):
    m = model(kind)
    one, other, third = (m.generate(given(kind, PROMPTS[:2]), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.video, other.video) and not torch.equal(one.video, third.video)
    if kind == "sound":
        assert torch.equal(one.audio, other.audio) and not torch.equal(one.audio, third.audio)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_streamed_as_it_is_generated(kind):
    m = model(kind)
    pieces = list(m.stream(given(kind, PROMPTS), seed=5))
    torch.testing.assert_close(torch.cat(pieces, 2), m.generate(given(kind, PROMPTS), seed=5).video, rtol=0, atol=1e-5)
    assert len(pieces) == (3 if kind in CACHED else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_row_goes_on_to_the_same(kind):
    m, made, calls = model(kind), [], []
    whole = m.generate(given(kind, PROMPTS), seed=5, made=made)
    ids = torch.cat(made, 1)
    assert len(ids) == 4 and ids.shape[1] == 3 * (TOKENS + SOUND * (kind == "sound"))
    for count in (12, 24, 36) if kind == "masked" else (3, 14, 33):
        again = [ids[:, :count]]
        same(m.generate(given(kind, PROMPTS), seed=5, made=again, progress=lambda *c: calls.append(c)), whole)
        torch.testing.assert_close(torch.cat(again, 1), ids, rtol=0, atol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match="tokens of 4 clips were made before, 1 are asked for"):
        m.generate(given(kind, PROMPTS[:1]), seed=5, made=[ids])


@pytest.mark.parametrize("kind", ["masked", "per_token_diffusion"])
def test_windows_that_were_made_before_an_interruption_are_kept(kind, monkeypatch):
    m, made, calls = model(kind), [], []
    whole = make(m, "t2v", Inputs(PROMPTS[0]), frames=13, samples=2)
    name = "fill" if kind == "masked" else "draw_latents"
    real = getattr(video_lm, name)

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(video_lm, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(m, "t2v", Inputs(PROMPTS[0]), frames=13, samples=2, made=made)
    assert torch.cat(made[0], 1).shape[:2] == (2, TOKENS) and made[1:] == [[]]
    again = make(m, "t2v", Inputs(PROMPTS[0]), frames=13, samples=2, made=made)
    same(again, whole)
    assert kind != "masked" or len(calls) == 3


@pytest.mark.parametrize("order", ["forward", "backward", "last_first"])
@pytest.mark.parametrize("decoding", [OneByOne(), Jacobi(4)], ids=str)
@pytest.mark.parametrize("kind", CODES)
def test_cached_decoding_chooses_what_one_uncached_pass_does(kind, decoding, order):
    """With sound: test_with_sound.py, of continuous tokens: test_token_diffusion.py; a masked head has no cache."""
    m, made, asked = model(kind), [], given(kind, PROMPTS[1:2]).replace(order=order)
    clip = m.generate(asked, sampling=Sampling(temperature=0, decoding=decoding), made=made)
    ids, start = torch.cat(made, 1), m.packer.pack(asked, 0)
    numbers, grid = m.packer.order(asked), m.packer.grid(asked)
    codes = m.lm.head.vocabulary.from_visual(ids)
    assert torch.equal(clip.video, m.tokenizer.decode(codes[:, numbers.argsort()].unflatten(1, grid)))
    assert torch.equal(torch.cat(list(m.stream(asked, sampling=Sampling(temperature=0))), 2), clip.video)
    hidden = m.lm(start.followed_by(ids, Tokens.positions(grid, m.device)[numbers]))[:, start.length - 1 : -1]
    parts = m.lm.head.split(m.lm.head.vocabulary.from_visual(ids))
    for scores, part in zip(m.lm.head.logits_given(hidden, parts), parts, strict=True):
        assert torch.equal(scores.argmax(-1), part)


def test_ways_to_decode_that_would_change_nothing_or_the_wrong_places_are_refused():
    with pytest.raises(ValueError, match="a masked head has passes of its own; leave the sampler with Diagonal out"):
        model("masked").generate(PROMPTS[0], sampling=Sampling(decoding=Diagonal()))
    m = model("categorical")
    lm = LanguageModel(PixelCNN(32, 1), Categorical(m.lm.head.vocabulary, 32))
    for decoding in (Diagonal(), Blocks()):
        with pytest.raises(ValueError, match="PixelCNN makes tokens in the raster's order; leave sampler=diagonal and"):
            VideoLM(m.tokenizer, m.text, lm, m.tasks, SHAPE, sampling=Sampling(decoding=decoding))


def test_a_model_of_the_raster_is_asked_in_its_order_and_has_no_masked_head():
    m = model("categorical")
    lm = LanguageModel(PixelCNN(32, 1, (2, 3, 3)), Categorical(m.lm.head.vocabulary, 32))
    raster = VideoLM(m.tokenizer, m.text, lm, m.tasks, SHAPE)
    for order in ORDERS:
        asked = given("categorical", PROMPTS[:1]).replace(order=order)
        sequence = raster.packer.pack(asked, 0, m.tokenizer.encode(torch.rand(1, 3, *SHAPE) * 2 - 1))
        x = lm.head.vectors(sequence).detach().requires_grad_()
        y, first = lm.transformer(x, sequence)[0], sequence.prefix
        for column in range(first - 1, sequence.length - 1):
            assert not torch.autograd.grad(y[column].sum(), x, retain_graph=True)[0][0, max(column + 1, first) :].any()
    with pytest.raises(ValueError, match="Masked predicts from all sides and PixelCNN sees what is earlier"):
        LanguageModel(PixelCNN(32, 1), Masked(m.lm.head.vocabulary, 32, Categorical))


def step(kind: str, m: VideoLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a step of training."""
    torch.manual_seed(1)
    asked = given(kind, PROMPTS[:2])
    tokens = m.tokenizer.encode(torch.rand(2, 3, *SHAPE) * 2 - 1)
    sound = {"sound": m.audio.encode(torch.rand(2, 2, 18_000) - 0.5)} if kind == "sound" else {}
    sequence = m.packer.pack(asked, 0, tokens, **sound)
    m.lm.zero_grad()
    torch.manual_seed(2)
    loss, _ = m.lm.loss(sequence)
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in m.lm.parameters() if weight.grad is not None]


@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize("kind", KINDS)
def test_backends_of_attention_train_as_the_reference_does(kind, attention):
    loss, gradients = step(kind, model(kind, "reference"))
    other, also = step(kind, model(kind, attention))
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(also, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_of_attention_make_the_same_clips(kind):
    clip = model(kind, "reference").generate(given(kind, PROMPTS[:1]), seed=1)
    for attention in ("sdpa", "math", "flex"):
        same(model(kind, attention).generate(given(kind, PROMPTS[:1]), seed=1), clip)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_train_as_eager_ones_do(kind, backend):
    m = model(kind, "math")
    loss, gradients = step(kind, m)
    try:
        for block in m.lm.transformer.blocks:
            block.compile(backend=backend)
        other, also = step(kind, m)
    finally:
        for block in m.lm.transformer.blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(also, gradients, rtol=1e-3, atol=1e-4)
