"""Learning from a reward for clips that the model makes."""

import csv
import itertools
from types import SimpleNamespace

import pytest
import torch

from making import small_model
from programs import LM, TINY, error_line, program
from reelm.data.clip import Clip
from reelm.engine import reinforcement
from reelm.engine.callbacks import Draws
from reelm.engine.reinforcement import Reinforcement, advantages
from reelm.lm.parallel import Diagonal
from reelm.lm.sampling import Sampling
from sounding import RATE, sounding_model

CAPTIONS = ("a red star", "a blue circle", "a white heart")


def clips(count: int = 2, frames: int = 9, size: int = 32, sound: bool = False) -> Clip:
    audio = torch.rand(count, 2, RATE * frames // 8) - 0.5 if sound else None
    video = torch.rand(count, 3, frames, size, size) * 2 - 1
    return Clip(video, 8.0, CAPTIONS[:count], audio, RATE if sound else None)


def test_advantages_compare_the_samples_of_one_prompt():
    rewards = torch.tensor([1.0, 0, 0, 1, 5, 5, 5, 5])
    assert advantages(rewards, 4).tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    for same in (0.7, 0.1, 1 / 3, 5 / 6, 11 / 14):  # whose mean is another number in float32
        assert advantages(torch.full((16,), same), 8).tolist() == [0] * 16


@pytest.mark.parametrize(
    "make, task, sound",
    [
        (small_model, "t2i", False), (small_model, "interpolation", False), (small_model, "backward", False),
        (sounding_model, "t2av", True), (sounding_model, "v2a", True), (sounding_model, "a2v", True),
        (sounding_model, "av_continuation", True),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_the_likelihood_of_what_was_drawn(make, task, sound, monkeypatch):
    """The mean over samples and ids of advantage times negative log-likelihood."""
    monkeypatch.setattr(reinforcement, "AT_ONCE", 3)
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
    for i in range(4):
        codes = None if made.tokens is None else made.tokens[i : i + 1].clone()
        one = None if sounds is None else sounds[i : i + 1].clone()
        with torch.no_grad():
            sequence = model.packer.pack(given[[i]], model.task(task).marker, codes, sound=one)
        ids = int(sequence.loss.sum())
        total = total + gains[i] * ids * model.lm.loss(sequence)[0]
    expected = total / (4 * ids)
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


@pytest.mark.parametrize("make", [small_model, sounding_model])
def test_one_clip_is_enough(make):
    model = make()
    way = Reinforcement(lambda task, given, target, made: torch.arange(float(len(made))), samples=3)
    for task in model.tasks:
        clip = clips(1, model.task(task).frames or 9, model.shape[1], sound=model.audio is not None)
        if not model.task(task).controls:
            assert way.loss(model, clip, task)[0].isfinite(), task


def test_each_step_and_process_draws_other_samples():
    model, drawn = small_model(), []
    way = Reinforcement(lambda task, given, target, made: drawn.append(made.tokens) or torch.zeros(4), samples=2)
    clip, draws = clips(2, 1), Draws()
    draws.setup(None, None, "fit")
    for step, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        draws.on_train_batch_start(SimpleNamespace(global_step=step, global_rank=rank), None, None, step)
        way.loss(model, clip, "t2i")
    assert torch.equal(drawn[0], drawn[3])
    assert all((a != b).float().mean() > 0.5 for a, b in itertools.combinations(drawn[:3], 2))


def test_stored_tokens_are_enough():
    model, seen = small_model(), []
    way = Reinforcement(lambda task, given, target, made: seen.append(given.video) or torch.arange(4.0), samples=2)
    clip = clips()
    tokens = model.tokenizer.encode(clip.video)
    stored = clip.replace(video=clip.video.to("meta"), tokens=tokens)
    assert way.loss(model, stored, "i2v")[0].isfinite()
    torch.testing.assert_close(seen[0][0, :, :1], model.tokenizer.decode(tokens)[0, :, :1])


def test_rewards_may_be_whole_numbers_or_the_work_of_a_network():
    model, judge = small_model(), torch.nn.Linear(1, 1)
    for reward in (
        lambda *a: torch.tensor([1, 0, 0, 2]),
        lambda *a: judge(a[3].video.mean((1, 2, 3, 4))[:, None])[:, 0],
    ):
        assert Reinforcement(reward, samples=2).loss(model, clips(2, 1), "t2i")[0].isfinite()
    for wrong in (torch.ones(2), torch.tensor([1.0, float("nan"), 0, 0])):
        with pytest.raises(ValueError, match="the reward of 4 clips is a finite number each; it gave"):
            Reinforcement(lambda *_, wrong=wrong: wrong, samples=2).loss(model, clips(2, 1), "t2i")


def test_clips_are_drawn_in_the_precision_of_the_training():
    model, seen = small_model(), []
    model.draw = lambda *a, draw=model.draw: seen.append(model.lm.transformer.new_cache(1, 1).keys[0].dtype) or draw(*a)
    way = Reinforcement(lambda *_: torch.arange(4.0), samples=2)
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert way.loss(model, clips(2, 1), "t2i")[0].isfinite()
    assert seen == [torch.bfloat16, torch.float32]
    assert model.lm.transformer.new_cache(1, 1).keys[0].dtype is torch.float32


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
    for wrong in ({"guidance": 2.0}, {"temperature": 0.5}, {"sound_temperature": 0.5}, {"decoding": Diagonal()}):
        with pytest.raises(ValueError, match="draws codes one by one, with guidance=1 and temperature=1"):
            Reinforcement(lambda *_: None, sampling=Sampling(**wrong))
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"reward.weight={wrong}; give a number above 0"):
            Reinforcement(lambda *_: None, weight=wrong)
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
