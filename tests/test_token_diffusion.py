import pytest
import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.engine.loading import load
from reelm.engine.video_lm import VideoLM
from reelm.lm.language_model import LanguageModel
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.token_diffusion import ResidualMLP, TokenDenoising, TokenDiffusion, draw_latents
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Special, Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.packing import Packer
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tasks.task import Given
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ, Continuous
from reelm.tokenizers.text import SentencePieceText

LATENT = int(Special.latent)
SHAPE = (9, 16, 16)
TASKS = [
    Generation(), KnownFrames("continuation", first=(5,)), KnownFrames("interpolation", last=1),
    Painting("inpainting", True, 1), Stylization(),
]  # fmt: skip


def awake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.3)
    return model.eval()


def tokenizer(quantizer: nn.Module) -> MAGVIT2:
    torch.manual_seed(0)
    return MAGVIT2(
        quantizer, patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    ).eval()


@pytest.fixture(scope="module")
def model() -> VideoLM:
    video = tokenizer(Continuous(4))
    text = SentencePieceText.train([f"a red star moves left {i}" for i in range(20)], 400)
    head = TokenDiffusion(Vocabulary(0, text=text.vocabulary), 24, 4, hidden=16, depth=2)
    lm = awake(LanguageModel(Transformer(24, 2, 2, sites=(8, 8, 8)), head))
    tasks = {task.name: task for task in TASKS}
    return VideoLM(video, text, lm, tasks, SHAPE, 5.0, TokenDenoising(3, guidance=2.0)).eval()


def given(task) -> Given:
    torch.manual_seed(1)
    controls = {"depth": torch.rand(2, 1, *SHAPE), "flow": torch.randn(2, 2, *SHAPE)}
    whole = Clip(torch.rand(2, 3, *SHAPE) * 2 - 1, 5.0, ("a red star", "moves left"), controls=controls)
    return task.split(whole, torch.Generator().manual_seed(0))[0]


def columns(latents: torch.Tensor, prefix: int) -> Sequence:
    batch, length = latents.shape[:2]
    loss = torch.arange(length).expand(batch, -1) >= prefix
    ids = torch.full((batch, length), LATENT)
    positions = torch.arange(length)[:, None].expand(batch, -1, 3)
    return Sequence(ids, positions, prefix, loss, latents=latents)


def test_a_block_begins_as_the_identity():
    x = torch.randn(3, 16)
    assert torch.equal(ResidualMLP(16)(x, torch.randn(3, 16)), x)


class Exact(nn.Module):
    """The velocity of tokens from N(mean, std^2), where the hidden state is the mean."""

    std = 0.5

    def forward(self, noisy, time, told):
        share, rest = (time * torch.pi / 2).cos()[:, None], (time * torch.pi / 2).sin()[:, None]
        variance = share**2 * self.std**2 + rest**2
        clean = told + share * self.std**2 / variance * (noisy - share * told)
        noise = rest / variance * (noisy - share * told)
        return share * noise - rest * clean


def test_the_exact_network_draws_from_the_distribution():
    head = TokenDiffusion(Vocabulary(0), 2, 2)
    head.denoiser = Exact()
    means = torch.tensor([1.0, -2.0]).expand(4000, 2)
    made = head.sample(means, TokenDenoising(100), lambda: torch.randn(4000, 2))
    torch.testing.assert_close(made.mean(0), means[0], atol=0.05, rtol=0)
    torch.testing.assert_close(made.std(0), torch.full((2,), 0.5), atol=0.04, rtol=0)
    cold = head.sample(means, TokenDenoising(100, temperature=0.5), lambda: torch.randn(4000, 2))
    assert (cold.std(0) < 0.7 * made.std(0)).all()
    both = torch.cat([means, torch.zeros(4000, 2)])  # beyond the told means by as much as they are from the untold
    guided = head.sample(both, TokenDenoising(50, guidance=2.0), lambda: torch.randn(4000, 2))
    torch.testing.assert_close(guided.mean(0), 2 * means[0], atol=0.1, rtol=0)


def test_a_mixture_is_learned():
    """A token near (1, 1) or (-1, -1): a mean would lie between them."""
    head = TokenDiffusion(Vocabulary(0), 4, 2, hidden=48, depth=2)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    hidden, mask = torch.zeros(1, 257, 4), torch.arange(257)[None] > 0
    for _ in range(250):
        sides = torch.randint(2, (1, 257, 1)) * 2.0 - 1
        loss, _ = head.loss(hidden, sides + 0.1 * torch.randn(1, 257, 2), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        made = head.sample(torch.zeros(500, 4), TokenDenoising(40), lambda: torch.randn(500, 2))
    near = (made - made.sign()).abs().amax(1) < 0.5
    assert near.float().mean() > 0.9 and (made[:, 0].sign() == made[:, 1].sign()).float().mean() > 0.95
    assert 0.35 < (made[:, 0] > 0).float().mean() < 0.65


def test_the_loss_counts_what_is_marked_and_gradients_reach_everything(model):
    lm = awake(
        LanguageModel(Transformer(24, 2, 2, sites=(8, 8, 8)), TokenDiffusion(Vocabulary(0), 24, 3, 16, 2))
    ).train()
    latents = torch.randn(2, 6, 3)
    sequence = columns(latents, 3)
    torch.manual_seed(0)
    loss, metrics = lm.loss(sequence)
    loss.backward()
    assert metrics["mse"] == loss and loss > 0
    untouched = {name for name, weight in lm.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert untouched == {"head.others.weight"}  # there are no ids in this sequence
    torch.manual_seed(0)
    last = latents.clone()
    last[:, -1] += 1.0
    assert lm.loss(columns(last, 3))[0] != loss
    hidden = lm(sequence)
    torch.testing.assert_close(lm(columns(last, 3))[:, :-1], hidden[:, :-1])  # nothing sees what comes later
    with pytest.raises(ValueError, match="no token of this batch"):
        lm.loss(sequence.replace(loss=torch.zeros(2, 6, dtype=torch.bool)))


def test_drawing_with_a_cache_is_drawing_without():
    lm = awake(LanguageModel(Transformer(24, 2, 2, sites=(8, 8, 8)), TokenDiffusion(Vocabulary(0), 24, 3, 16, 2)))
    start, where = columns(torch.randn(2, 4, 3), 4), torch.arange(4, 7)[:, None].expand(-1, 3)
    calls = []
    made = draw_latents(
        lm.transformer, lm.head, start, where, TokenDenoising(4), generator=seeded([1, 2]),
        callback=lambda count, latents: calls.append((count, latents.shape)),
    )  # fmt: skip
    assert calls == [(i, (2, 3)) for i in (1, 2, 3)]
    generators, latents = seeded([1, 2]), start.latents
    with torch.no_grad():
        for step in range(3):
            following = torch.cat([start.positions, where[:step].expand(2, -1, 3)], 1)
            following = torch.cat([following[:, 1:], where[step].expand(2, 1, 3)], 1)
            sequence = columns(latents, 4).replace(loss=None, next_positions=following)
            hidden = lm(sequence)[:, -1]
            new = lm.head.sample(
                hidden, TokenDenoising(4), lambda: torch.stack([torch.randn(3, generator=g) for g in generators])
            )
            latents = torch.cat([latents, new[:, None]], 1)
    torch.testing.assert_close(made, latents[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_sequences_hold_latents_where_they_hold_tokens(model, task):
    known = given(task)
    target = torch.randn(2, 3, 2, 2, 4)
    sequence = model.packer.pack(known, task.marker, target)
    latent = sequence.ids == LATENT
    assert sequence.latents.shape == (2, sequence.length, 4) and latent[:, -12:].all()
    assert torch.equal(sequence.latents[:, -12:], target.flatten(1, 3))
    assert not sequence.latents[sequence.ids < 18].masked_select((sequence.ids[sequence.ids < 18] != 15)[:, None]).any()
    clip = model.generate(known, task.name, seed=3)
    assert clip.video.shape == (2, 3, *SHAPE)
    if task.name == "continuation":
        first = model.tokenizer.decode(model.tokenizer.encode(known.video[:, :, :5]))
        torch.testing.assert_close(clip.video[:, :, :5], first, atol=1e-5, rtol=0)


def test_ids_and_latents_of_the_same_codes_stand_at_the_same_places(model):
    video = tokenizer(LFQ(6))
    text = model.text
    discrete = Packer(video, text, Vocabulary(64, text=text.vocabulary))
    points = Packer(video, text, Vocabulary(0, text=text.vocabulary), continuous=True)
    for task in TASKS:
        known = given(task)
        one, other = discrete.pack(known, task.marker), points.pack(known, task.marker)
        assert torch.equal(one.positions, other.positions) and one.prefix == other.prefix
        tokens = (one.ids >= 256) & (one.ids < 320)
        assert torch.equal(tokens, other.ids == LATENT)
        codes = video.quantizer.lookup(one.ids[tokens].sub(256).view(1, -1, 1, 1))[0].flatten(1).t()
        torch.testing.assert_close(other.latents[tokens], codes)


def test_a_saved_model_generates_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.sampling == TokenDenoising(3, guidance=2.0)
    again = loaded.generate(["a red star", "moves left"], seed=4).video
    torch.testing.assert_close(again, model.generate(["a red star", "moves left"], seed=4).video, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="cannot sample by Sampling; leave sampler=... out"):
        model.generate("a red star", sampling=Sampling())
    torch.testing.assert_close(again[1:], model.generate("moves left", seed=5).video, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: TokenDenoising(0), "steps is 1 or more"),
        (lambda: TokenDenoising(temperature=-1), "temperature is a number from 0 on"),
        (lambda: TokenDenoising(guidance=-1), "guidance is a number from 0 on"),
        (lambda: TokenDiffusion(Vocabulary(0), 4, 2, repeats=0), "repeats is 1 or more"),
        (lambda: Vocabulary(None), "take head=per_token_diffusion, or a tokenizer with codes"),
    ],
)
def test_mistakes_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
