"""Learning from a reward for clips that the model makes."""

import csv

import pytest
import torch

from making import small_model
from programs import LM, TINY, error_line, program
from reelm.data.clip import Clip
from reelm.engine.reinforcement import Reinforcement, advantages
from reelm.lm.sampling import Sampling
from sounding import RATE, sounding_model

CAPTIONS = ("a red star", "a blue circle", "a white heart")


def clips(count: int = 2, frames: int = 9, size: int = 32, sound: bool = False) -> Clip:
    audio = torch.rand(count, 2, RATE * frames // 8) - 0.5 if sound else None
    video = torch.rand(count, 3, frames, size, size) * 2 - 1
    return Clip(video, 8.0, CAPTIONS[:count], audio, RATE if sound else None)


def test_advantages_compare_the_samples_of_one_prompt():
    rewards = torch.tensor([1.0, 0, 0, 1, 5, 5, 5, 5])
    found = advantages(rewards, 4)
    assert found[4:].tolist() == [0] * 4 and torch.equal(found[0], found[3]) and torch.equal(found[0], -found[1])
    torch.testing.assert_close(found.square().mean(), torch.tensor(1.0))
    assert advantages(torch.ones(6), 3).tolist() == [0] * 6


@pytest.mark.parametrize(
    "make, task, sound",
    [
        (small_model, "t2i", False), (small_model, "interpolation", False), (small_model, "backward", False),
        (sounding_model, "t2av", True), (sounding_model, "v2a", True), (sounding_model, "a2v", True),
        (sounding_model, "av_continuation", True),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_the_likelihood_of_what_was_drawn(make, task, sound):
    """-sum of advantage times log-likelihood, sample by sample, over the sum of the advantages' sizes and the ids."""
    model, drawn = make(), []
    model.lm.requires_grad_(True)
    size = model.shape[1]

    def reward(task, given, target, made):
        assert len(given) == len(target) == len(made) == 4
        assert target.captions == (CAPTIONS[0],) * 2 + (CAPTIONS[1],) * 2
        drawn.append((given, made))
        return torch.tensor([0.0, 1, 3, 1])

    draw = model.draw

    def kept(*arguments, **options):
        made = draw(*arguments, **options)
        drawn.append(made[1])
        return made

    model.draw = kept
    count = 1 if task == "t2i" else 9
    loss, mean = Reinforcement(reward, samples=2).loss(model, clips(2, count, size, sound), task)
    assert mean == 1.25
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None}
    model.lm.zero_grad()
    sounds, (given, made) = drawn
    gains, total, ids = advantages(torch.tensor([0.0, 1, 3, 1]), 2), 0.0, 0
    slots = model.packer.slots(given.captions)
    for i in range(4):
        codes = None if made.tokens is None else made.tokens[i : i + 1].clone()
        one = None if sounds is None else sounds[i : i + 1].clone()
        with torch.no_grad():
            sequence = model.packer.pack(given[[i]], model.task(task).marker, codes, slots=slots, sound=one)
        ids = int(sequence.loss.sum())
        total = total + gains[i] * ids * model.lm.loss(sequence)[0]
    expected = total / (gains.abs().sum() * ids)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in model.lm.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_what_is_drawn_is_what_generate_makes():
    model = sounding_model()
    for task in ("t2av", "v2a", "a2v", "av_continuation"):
        given, _ = model.task(task).split(clips(2, 9, 16, sound=True), torch.Generator())
        made, sound = model.draw(given, task, Sampling(), seed=3)
        same = model.generate(given, task, Sampling(), seed=3)
        assert torch.equal(made.video, same.video) and (made.tokens is None) == (task == "v2a")
        if "audio" in given.asks:
            assert torch.equal(made.audio, same.audio)
            assert torch.equal(made.audio, model.audio.decode(sound)[..., : made.audio.shape[-1]])
        if made.tokens is not None:
            assert torch.equal(model.tokenizer.decode(made.tokens), made.video)


def test_a_reward_is_learned():
    """Pictures of codes below 4 of 16, which a model without training draws in a quarter of the places."""
    model = small_model()
    model.lm.requires_grad_(True).train()
    optimizer = torch.optim.Adam(model.lm.parameters(), 0.01)
    way = Reinforcement(lambda task, given, target, made: (made.tokens < 4).float().mean((1, 2, 3)), samples=8)
    rewards = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, reward = way.loss(model, clips(2, 1), "t2i")
        rewards.append(float(reward))
        if not loss.requires_grad:  # all are alike: there is no more to learn
            break
        loss.backward()
        optimizer.step()
    assert rewards[0] < 0.35 and rewards[-1] > 0.6
    assert model.lm.training and all(getattr(p, "light", None) is None for p in model.lm.parameters())


def test_where_no_sample_is_better_nothing_is_learned():
    model = small_model()
    loss, reward = Reinforcement(lambda *_: torch.ones(4), samples=2).loss(model, clips(2, 1), "t2i")
    assert loss == 0 and reward == 1 and not loss.requires_grad


def test_mistakes(tokenizer, tmp_path, capfd):
    for wrong in (1, 2.5):
        with pytest.raises(ValueError, match=f"reward.samples={wrong}; give 2 or more"):
            Reinforcement(lambda *_: None, samples=wrong)
    with pytest.raises(ValueError, match="with guidance=1"):
        Reinforcement(lambda *_: None, sampling=Sampling(guidance=2.0))
    output = tmp_path / "lm"
    arguments = ("reward=zoetrope", f"stage.tokenizer={tokenizer}/model", f"output={output}", *LM, *TINY)
    assert program("train", *arguments, "head=masked") != 0
    assert "reward=... is for heads that predict token by token" in error_line(capfd)
    assert not output.exists()


def test_the_program_learns_from_a_reward(tokenizer, tmp_path):
    output = tmp_path / "lm"
    arguments = ("reward=zoetrope", "reward.samples=2", "task=t2i", "trainer.log_every_n_steps=1")
    assert program("train", *arguments, f"stage.tokenizer={tokenizer}/model", f"output={output}", *LM, *TINY) == 0
    with open(output / "logs/metrics.csv", newline="") as file:
        rewards = [float(row["reward/t2i"]) for row in csv.DictReader(file) if row.get("reward/t2i")]
    assert rewards and all(0 <= reward <= 1.5 for reward in rewards)
