"""Continuous tokens in masked order: what is hidden stays hidden, what is known stays, and each is made once."""

import pytest
import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.engine.loading import load
from reelm.engine.video_lm import VideoLM
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked_diffusion import MaskedDenoising, MaskedTokenDiffusion, fill_latents
from reelm.lm.sampling import seeded
from reelm.lm.sequence import Sequence
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion, cosines
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Special, Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.painting import Painting
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import Continuous
from reelm.tokenizers.text import SentencePieceText

LATENT, MASK = int(Special.latent), int(Special.mask)


def model(**settings) -> LanguageModel:
    torch.manual_seed(0)
    head = MaskedTokenDiffusion(Vocabulary(0), 24, 2, **{"hidden": 24, "depth": 2, **settings})
    lm = LanguageModel(Transformer(24, 2, 2, sites=(8, 8, 8)), head)
    for weight in lm.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return lm


def sequence(latents: torch.Tensor, prefix: int = 2, made: bool = True) -> Sequence:
    """Latents `(B, L, 2)` of which the first `prefix` are known; made=False: the others are yet to be made."""
    batch, length = latents.shape[:2]
    loss = torch.arange(length).expand(batch, -1) >= prefix
    ids = torch.full((batch, length), LATENT)
    if not made:
        ids, latents = torch.where(loss, MASK, ids), latents.masked_fill(loss[..., None], 0)
    positions = torch.arange(length)[:, None].expand(batch, -1, 3)
    return Sequence(ids, positions, prefix, loss, latents=latents)


def test_hidden_tokens_cannot_be_seen_and_others_can():
    lm, latents = model(least=0.3).eval(), torch.randn(6, 8, 2)
    whole = sequence(latents)
    hidden = lm.head.hide(whole)
    assert not hidden[:, :2].any() and hidden.any(1).all() and (whole.loss & ~hidden).any()
    states = lm(lm.head.shown(whole, hidden))
    other = latents + hidden[..., None] * torch.randn(6, 8, 2)
    assert torch.equal(lm(lm.head.shown(sequence(other), hidden)), states)
    place = (whole.loss & ~hidden).nonzero()[0]
    other = latents.clone()
    other[place[0], place[1]] += 1.0
    changed = (lm(lm.head.shown(sequence(other), hidden)) - states).abs().amax(-1)[place[0]]
    assert (changed > 1e-4).all()  # on both sides


def test_shares_that_are_hidden():
    whole = sequence(torch.randn(400, 22, 2))
    share = model(least=0.7).head.hide(whole)[:, 2:].float().mean(1)
    assert share.min() >= 0.7 and share.max() == 1 and 0.8 < share.mean() < 0.92
    assert (model(least=1.0).head.hide(whole) == whole.loss).all()


def test_the_loss_is_of_hidden_tokens_and_gradients_reach_everything():
    lm, latents = model(least=0.5).train(), torch.randn(4, 10, 2)
    torch.manual_seed(1)
    hidden = lm.head.hide(sequence(latents))
    torch.manual_seed(1)
    loss, metrics = lm.loss(sequence(latents))
    loss.backward()
    assert metrics["mse"] == loss
    untouched = {name for name, weight in lm.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert not untouched and lm.head.others.weight.grad[MASK].any()
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(lm.head.hide(sequence(latents)), hidden)
        want = lm.head.denoising(lm(lm.head.shown(sequence(latents), hidden))[hidden], latents[hidden])[0]
    torch.testing.assert_close(want, loss)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_token_is_made_once_and_known_ones_stay(guidance):
    lm, start = model().eval(), sequence(torch.randn(3, 12, 2), 3, made=False)
    other = start.replace(latents=start.latents * 0.5)
    calls = []
    sampling = MaskedDenoising(3, guidance=guidance, passes=4)
    made = fill_latents(
        lm.transformer, lm.head, start, sampling, other, seeded([1, 2, 3]),
        lambda count, latents: calls.append((count, latents.clone())),
    )  # fmt: skip
    assert made.shape == (3, 9, 2) and len(calls) == 4
    before = torch.zeros(3, 9, 2)
    for count, latents in calls:
        there, was = latents.abs().sum(-1) > 0, before.abs().sum(-1) > 0
        assert (there.sum(1) == count).all() and torch.equal(latents[was], before[was]) and there[was].all()
        before = latents
    assert calls[0][0] < calls[1][0] - calls[0][0] and torch.equal(made, before)  # few at first: cosine
    assert not torch.equal(calls[0][1][0] != 0, calls[0][1][1] != 0)  # each row has its own order
    # a row does not depend on its neighbours; it stays in its place, since elsewhere in a batch some processors round
    # its products otherwise, which guidance and solver magnify
    first, second = (Sequence.cat([each[2:], each[1:2], each[:1]]) for each in (start, other))
    moved = fill_latents(lm.transformer, lm.head, first, sampling, second, seeded([5, 2, 6]))
    torch.testing.assert_close(moved[1], made[1], atol=1e-5, rtol=1e-4)
    assert not torch.equal(moved[0], made[2])
    if guidance == 1:
        single = fill_latents(lm.transformer, lm.head, start[1:2], sampling, other[1:2], seeded([2]))
        torch.testing.assert_close(single[0], made[1], atol=1e-5, rtol=1e-4)


class Neighbours(nn.Module):
    """For tokens of unit variance and correlation 0.8: mean and deviation of each, given those that can be seen."""

    def forward(self, x: torch.Tensor, shown: Sequence) -> torch.Tensor:
        seen = (shown.ids == LATENT)[..., None]
        count, total = seen.sum(1, keepdim=True), (shown.latents * seen).sum(1, keepdim=True)
        share = 0.8 / (1 + 0.8 * (count - 1))
        variance = (1 - 0.8 * share * count).expand(-1, x.shape[1], -1)
        return torch.cat([(share * total).expand(-1, x.shape[1], -1), variance.sqrt()], -1)


class Exact(nn.Module):
    """The velocity of tokens from N(mean, std^2), which the hidden state is."""

    def forward(self, noisy, time, told):
        share, rest = (part[:, None] for part in cosines(time))
        (mean, std) = told.split(1, -1)
        error = (noisy - share * mean) / (share**2 * std**2 + rest**2)
        return share * rest * error - rest * (mean + share * std**2 * error)


def test_one_token_a_pass_draws_from_the_joint_distribution_and_all_at_once_from_the_marginals():
    head = MaskedTokenDiffusion(Vocabulary(0), 2, 1)
    head.denoiser, count = Exact(), 4000
    positions = torch.arange(4)[:, None].expand(count, -1, 3)
    ids = torch.tensor([LATENT, MASK, MASK, MASK]).expand(count, -1)
    latents = torch.randn(count, 4, 1) * torch.tensor([1.0, 0, 0, 0])[:, None]  # one is known
    start = Sequence(ids, positions, 1, ids == MASK, latents=latents)
    made = fill_latents(Neighbours(), head, start, MaskedDenoising(40, passes=3))
    whole = torch.cat([latents[:, :1], made], 1)[..., 0]
    torch.testing.assert_close(whole.mean(0), torch.zeros(4), atol=0.06, rtol=0)
    torch.testing.assert_close(whole.T.cov(), 0.2 * torch.eye(4) + 0.8, atol=0.08, rtol=0)
    apart = fill_latents(Neighbours(), head, start, MaskedDenoising(40, passes=1))[..., 0]
    assert apart.T.cov()[0, 1] < 0.72 and abs(apart.std() - 1) < 0.05  # agree by the known one alone: 0.64


def test_a_model_of_clips_keeps_what_it_is_told(tmp_path):
    torch.manual_seed(0)
    video = MAGVIT2(
        Continuous(4), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3),) * 2
    )
    text = SentencePieceText.train([f"a red star moves left {i}" for i in range(20)], 400)
    head = MaskedTokenDiffusion(Vocabulary(0, text=text.vocabulary), 24, 4, hidden=16, depth=2)
    lm = LanguageModel(Transformer(24, 2, 2, sites=(8, 8, 8)), head)
    ends = (KnownFrames("continuation", (5,)), KnownFrames("interpolation", last=1))
    tasks = {task.name: task for task in (Generation("t2v"), *ends, Painting("inpainting", True, 1))}
    own = VideoLM(video, text, lm, tasks, (9, 16, 16), 5.0, MaskedDenoising(2, guidance=2.0, passes=2)).eval()
    whole = Clip(torch.rand(2, 3, 9, 16, 16) * 2 - 1, 5.0, ("a red star", "moves left"))
    for task in tasks.values():
        given, target = task.split(whole, torch.Generator().manual_seed(0))
        packed = own.packer.pack(given, task.marker, own.tokenizer.encode(target.video))
        assert float(own.lm.loss(packed)[0]) > 0 and packed.interior is None
        clip = own.generate(given, task.name, seed=3)
        assert clip.video.shape == (2, 3, 9, 16, 16)
        if task.name == "continuation":
            first = video.decode(video.encode(given.video[:, :, :5]))
            torch.testing.assert_close(clip.video[:, :, :5], first, atol=1e-5, rtol=0)
    own.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.sampling == own.sampling
    again = loaded.generate("moves left", seed=4).video
    torch.testing.assert_close(again, own.generate("moves left", seed=4).video, atol=1e-3, rtol=0)
    causal = LanguageModel(Transformer(24, 2, 2), TokenDiffusion(head.vocabulary, 24, 4, hidden=16))
    other = VideoLM(video, text, causal, tasks, (9, 16, 16), 5.0, TokenDenoising(2))
    with pytest.raises(ValueError, match="sampler=masked_denoising needs a model with a masked head"):
        other.generate("a red star", sampling=MaskedDenoising())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: MaskedDenoising(passes=0), "passes is 1 or more; got 0"),
        (lambda: MaskedDenoising(schedule="square"), "schedule is one of cosine"),
        (lambda: model(least=2.0), "least lies in"),
        (lambda: model().loss(sequence(torch.zeros(1, 3, 2), 3)), "no token of this batch"),
    ],
)
def test_mistakes_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
