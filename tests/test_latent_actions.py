"""Latent actions: the model that names them, a language model that is played by them, and what Genie is checked for."""

import pytest
import torch
from torch import Tensor, nn

from reelm.data.clip import Clip
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs
from reelm.engine.loading import load
from reelm.engine.video_lm import VideoLM
from reelm.evaluation.reconstruction import psnr
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.layouts import SpaceTime
from reelm.lm.masked import Masked, MaskedSampling
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tokenizers.latent_actions import LatentActions
from reelm.tokenizers.palette import Colours, Palette
from reelm.tokenizers.text import SentencePieceText

STEPS = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])  # right, left, down, up


def sprites(count: int) -> tuple[Tensor, Tensor]:
    """Clips `(B, 3, 3, 5, 5)` of a white pixel that begins in the middle and moves by one in each frame, in one of four
    directions that is drawn anew; and the moves `(B, 2)`."""
    moves = torch.randint(4, (count, 2))
    places = torch.cat([torch.full((count, 1, 2), 2), 2 + STEPS[moves].cumsum(1)], 1)
    rows, columns = (torch.arange(5) == places[..., axis, None] for axis in (0, 1))
    video = (rows[..., None] & columns[:, :, None]).float() * 2 - 1
    return video[:, None].expand(-1, 3, -1, -1, -1).contiguous(), moves


def tiny(**settings) -> LatentActions:
    torch.manual_seed(0)
    return LatentActions(
        **{"codes": 4, "dim": 8, "patch": 4, "width": 32, "heads": 2, "layers": "st", "window": 4, **settings}
    )


def toy(**settings) -> LatentActions:
    """For sprites: layers that first see what changed, then where."""
    return tiny(**{"patch": 1, "layers": "tst", "decoder_layers": "sts", "window": 3, **settings})


def test_actions_hold_all_that_comes_from_later_frames():
    model, video = tiny().eval(), torch.rand(2, 3, 5, 8, 8) * 2 - 1
    model(video)  # the codes of a new quantizer begin with what they see
    ids, frames = model.encode(video), model.frames(video)
    assert ids.shape == (2, 4) and ids.max() < 4
    made = model.predict(frames[:, :, :-1], ids)
    assert made.shape == (2, 3, 4, 8, 8) and made.abs().max() <= 1
    other = video.clone()
    other[:, :, 3] = torch.rand(2, 3, 8, 8) * 2 - 1
    again = model.encode(other)
    assert torch.equal(again[:, :2], ids[:, :2])  # an action does not see what comes after its frame
    torch.testing.assert_close(model.predict(model.frames(other)[:, :, :-1], ids)[:, :, :3], made[:, :, :3])
    swapped = ids.clone()
    swapped[:, 2] = (swapped[:, 2] + 1) % 4
    changed = (model.predict(frames[:, :, :-1], swapped) - made).abs().amax((0, 1, 3, 4))
    assert not changed[:2].any() and changed[2] > 1e-6


def test_gradients_pass_straight_through_the_codes():
    model, (video, _) = toy().train(), sprites(8)
    made, _, losses = model(video)
    (made - video[:, :, 1:]).square().mean().backward()
    assert losses["commitment"] >= 0
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name
    latents = model.latents(video).detach().requires_grad_()
    quantized = model.quantizer(latents)[0]
    slope = torch.randn_like(quantized)
    assert torch.equal(torch.autograd.grad(quantized, latents, slope)[0], slope)


def test_longer_strides_lead_from_latent_frame_to_latent_frame():
    model, video = tiny(stride=2).eval(), torch.rand(1, 3, 5, 8, 8)
    other = video.clone()
    other[:, :, 1::2] = 0
    assert model.encode(video).shape == (1, 2) and torch.equal(model.encode(video), model.encode(other))
    assert model(video)[0].shape == (1, 3, 2, 8, 8)


def played(actions: LatentActions, codes: int = 2) -> VideoLM:
    """A toy world of pixels in two colours."""
    torch.manual_seed(0)
    actions.train()(sprites(8)[0])  # the codes of a new quantizer are those of what it first sees
    palette = Palette(Colours(codes))
    palette.quantizer.table.data = torch.linspace(-1, 1, codes)[:, None].repeat(1, 3)
    text = SentencePieceText.train([f"a square moves left {i}" for i in range(20)], 400)
    head = Masked(
        Vocabulary(codes, text=text.vocabulary), 48, Categorical, schedule="uniform", least=0.5, reconstruct=0.0,
        actions=actions.codes,
    )  # fmt: skip
    lm = LanguageModel(Transformer(48, 4, 2, sites=(8, 8, 8), layout=SpaceTime()), head)
    sampling = MaskedSampling(steps=3, by_frame=True)
    tasks = {t.name: t for t in (KnownFrames("i2v"), KnownFrames("continuation", (2,)), Generation("t2v"))}
    return VideoLM(palette, text, lm, tasks, (3, 5, 5), 4.0, sampling, actions=actions)


def test_clips_are_played_by_actions(tmp_path):
    model, (video, _) = played(toy()).eval(), sprites(2)
    for weight in model.lm.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    given, target = model.task("i2v").split(Clip(video, 4.0, ("", "")))
    ids = model.tokenizer.encode(target.video)
    acts = torch.tensor([[0, 1], [3, 3]])
    packed = model.packer.pack(given.replace(actions=acts), 0, ids)
    grid = packed.actions[:, -3 * 25 :].view(2, 3, 25)
    assert (packed.actions[:, : -3 * 25] == -1).all() and (grid[:, 0] == -1).all()
    assert torch.equal(grid[:, 1:], acts[..., None].expand(-1, -1, 25))
    vectors = model.lm.head.vectors(packed)
    plain = model.lm.head.vectors(packed.replace(actions=None))
    torch.testing.assert_close((vectors - plain)[0, -25:], model.lm.head.acts.weight[1].expand(25, -1))
    hidden = model.lm(model.lm.head.shown(packed, packed.loss))[:, -3 * 25 :].view(2, 3, 25, -1)
    later = model.packer.pack(given.replace(actions=acts.flip(0)), 0, ids)
    later = later.replace(actions=torch.where(later.positions[..., 0] < 2, packed.actions, later.actions))
    other = model.lm(model.lm.head.shown(later, later.loss))[:, -3 * 25 :].view(2, 3, 25, -1)
    torch.testing.assert_close(other[:, :2], hidden[:, :2])  # an action says nothing of frames before it
    assert ((other - hidden)[:, 2:].abs().amax(-1) > 1e-5).all()

    made = [model.generate(given.replace(actions=a), "i2v", seed=3).video for a in (acts, acts, acts.flip(0))]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    free = [model.generate(given, "i2v", seed=seed).video for seed in (3, 3)]
    assert torch.equal(*free)  # where none are given, they are drawn by the seed
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(again.actions.encode(video), model.actions.encode(video))
    known = model.task("continuation").split(Clip(video, 4.0, ("", "")))[0]
    seen = model._played(known.replace(actions=acts[:, :1]), 0).actions
    assert torch.equal(seen, torch.cat([model.actions.encode(video[:, :, :2]), acts[:, :1]], 1))


def test_users_play_clips_of_any_length_and_are_told_their_mistakes():
    model, (video, _) = played(toy()).eval(), sprites(1)
    first, calls = Clip(video[:, :, :1], 4.0, ("",)), []
    generate = model.generate
    model.generate = lambda given, *more, **options: calls.append(given) or generate(given, *more, **options)
    sampling = MaskedSampling(steps=1, by_frame=True)
    clip = make(model, "i2v", Inputs(image=first), frames=6, sampling=sampling, samples=2, actions=[0, 1, 2, 3, 1])
    assert clip.video.shape == (2, 3, 6, 5, 5)
    assert [given.actions[1].tolist() for given in calls] == [[0, 1], [2], [3], [1]]
    wrong = [
        ([0, 1, 2], "actions has 3 numbers; this clip takes 2, one for each latent frame to make"),
        ([0, 4], "actions are numbers from 0 to 3; got 4"),
        ([-1, 0], "actions are numbers from 0 to 3; got -1"),
    ]
    for actions, message in wrong:
        with pytest.raises(ValueError, match=message):
            make(model, "i2v", Inputs(image=first), sampling=sampling, actions=actions)
        given = calls[0].replace(actions=torch.tensor([actions]).expand(2, -1))
        with pytest.raises(ValueError, match=message[:30]):
            generate(given, "i2v", sampling)
    still = VideoLM(
        model.tokenizer, model.text, LanguageModel(Transformer(48, 1, 2), Categorical(Vocabulary(2, text=400), 48)),
        model.tasks, model.shape, 4.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="not played by actions; leave actions=... out"):
        make(still, "i2v", Inputs(image=first), actions=[0, 1])
    with pytest.raises(ValueError, match="the head knows 4 actions and the latent action model has 3"):
        VideoLM(model.tokenizer, model.text, model.lm, model.tasks, actions=toy(codes=3))
    with pytest.raises(ValueError, match="actions lead over 2 frames, a latent frame has 1"):
        VideoLM(model.tokenizer, model.text, model.lm, model.tasks, actions=toy(stride=2))
    with pytest.raises(ValueError, match="no vectors for them; set head.actions"):
        head = Masked(Vocabulary(2, text=400), 48, Categorical)
        head.vectors(model.packer.pack(calls[0], 0))


def learn(model: nn.Module, loss, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.9), weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()


@pytest.mark.slow
def test_genie_finds_the_directions_in_clips_alone_and_is_played_by_them():
    """An action has one direction, the actions of a clip foretell it better than random ones do, and a model that is
    told them obeys."""
    actions = toy(decay=0.9).train()

    def naming() -> Tensor:
        video, _ = sprites(16)
        made, _, terms = actions(video)
        return (made - video[:, :, 1:]).square().mean() + 0.25 * terms["commitment"]

    learn(actions, naming, 700, 5e-3)
    video, moves = sprites(256)
    ids = actions.eval().encode(video)
    table = torch.zeros(4, 4).index_put((ids.flatten(), moves.flatten()), torch.ones(()), accumulate=True)
    assert table.amax(1).sum() / table.sum() > 0.9, table

    frames = actions.frames(video)
    right, wrong = (
        psnr(actions.predict(frames[:, :, :-1], told), frames[:, :, 1:]).mean()
        for told in (ids, torch.randint_like(ids, 4))
    )
    assert right - wrong > 0.5, (right, wrong)

    named = {name: value.clone() for name, value in actions.state_dict().items()}
    model = played(actions)
    model.actions.load_state_dict(named)
    model.actions.eval()
    learn(model.lm.train(), lambda: model.loss(Clip(sprites(32)[0], 4.0, ("",) * 32), "i2v")[0], 800, 3e-3)
    model.eval()
    surest = MaskedSampling(steps=4, by_frame=True, temperature=0.0, noise=0.0, guidance=1.0)
    video, ids = video[:64], ids[:64]
    given = model.task("i2v").split(Clip(video, 4.0, ("",) * 64))[0]
    other = (ids + torch.randint_like(ids, 1, 4)) % 4
    right, wrong = (model.generate(given.replace(actions=acts), "i2v", surest).video for acts in (ids, other))
    changed = (right - wrong)[:, :, 1].abs().amax((1, 2, 3)) > 1
    assert changed.float().mean() > 0.9  # another action, another next frame
    assert psnr(right, video).mean() - psnr(wrong, video).mean() > 3
    assert ((right - video).abs().amax((1, 2, 3, 4)) < 1).float().mean() > 0.6  # the move that the action is named for
