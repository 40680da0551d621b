"""The adversary of sound: shapes, its losses, and gradients that go where they belong."""

import pytest
import torch
from torch import nn

from reelm.tokenizers.audio_discriminator import (
    SoundAdversary,
    SoundDiscriminator,
    SpectrumDiscriminator,
    WaveDiscriminator,
    feature_matching,
)


def small(channels: int = 2) -> SoundDiscriminator:
    return SoundDiscriminator(channels, width=4, window=128, scales=(1, 2))


def noise(samples: int = 1000, batch: int = 2, channels: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, samples) * 2 - 1


@pytest.mark.parametrize("samples", [600, 1000, 1001])
@pytest.mark.parametrize("channels", [1, 2])
def test_scores_run_along_a_sound_of_any_length(samples, channels):
    sound = noise(samples, channels=channels)
    made = small(channels)(sound)
    assert len(made) == 3 and all(part[-1].shape[:2] == (2, 1) for part in made)
    for part, step in zip(made[1:], (256, 512), strict=True):  # four strides of 4, and the scale
        assert abs(part[-1].shape[-1] - samples / step) <= 1


def test_a_scale_looks_at_averages():
    """What alternates from sample to sample is nothing to a discriminator that averages two."""
    net, flicker = WaveDiscriminator(1, 4, scale=2), torch.tensor([1.0, -1.0]).repeat(400).view(1, 1, -1)
    inner = slice(10, -10)  # the ends are averages with silence
    torch.testing.assert_close(net(flicker)[0][..., inner], net(torch.zeros_like(flicker))[0][..., inner])


def test_the_spectrum_sees_time_and_phase():
    net, sound = SpectrumDiscriminator(1, 4, 128, 32), noise(640, 1, 1)
    later = torch.cat([sound[..., :320], -sound[..., 320:]], -1)
    a, b = net(sound)[0], net(later)[0]
    assert torch.allclose(a[:, :, :4], b[:, :, :4], atol=1e-5) and not torch.allclose(a[:, :, -4:], b[:, :, -4:])


def test_feature_matching_is_the_mean_distance_before_the_score():
    ours = [[torch.tensor([1.0]), torch.tensor([9.0])], [torch.tensor([0.0, 2.0]), torch.tensor([5.0])]]
    theirs = [[torch.tensor([4.0]), torch.tensor([0.0])], [torch.tensor([1.0, 0.0]), torch.tensor([5.0])]]
    assert feature_matching(ours, theirs).item() == pytest.approx((3 + 1.5) / 2)


def test_one_pass_gives_both_players_their_own_gradients():
    torch.manual_seed(0)
    adversary = SoundAdversary(small(), weight=0.7, features=2.0)
    real, fake = noise(), noise().requires_grad_()
    total, terms = adversary(fake, real)
    total.backward()
    together = [p.grad.clone() for p in adversary.parameters()]
    net = adversary.discriminator
    heard, of_real = net(fake), net(real)
    loss = -0.7 * sum(part[-1].mean() for part in heard) / 3 + 2 * feature_matching(heard, of_real)
    torch.testing.assert_close(fake.grad, torch.autograd.grad(loss, fake)[0])
    of_fake, of_real = net(fake.detach()), net(real)
    hinge = sum((1 - r[-1]).relu().mean() + (1 + f[-1]).relu().mean() for r, f in zip(of_real, of_fake, strict=True))
    for a, b in zip(together, torch.autograd.grad(hinge / 3, list(adversary.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    assert terms["discriminator"].item() == pytest.approx(hinge.item() / 3, rel=1e-5)


def test_the_tokenizer_listens_from_its_step_on():
    adversary, found = SoundAdversary(small(), start=1), []
    for _ in range(2):
        fake = noise().requires_grad_()
        adversary(fake, noise())[0].backward()
        found.append(fake.grad.abs().max().item() > 0)
    assert found == [False, True] and adversary.steps == 2
    adversary.eval()(noise(), noise())
    assert adversary.steps == 2


def test_it_learns_to_tell_dull_from_clear():
    torch.manual_seed(0)
    adversary = SoundAdversary(small(1))
    optimizer = torch.optim.Adam(adversary.parameters(), 2e-3, betas=adversary.betas)
    first = None
    for _ in range(25):
        real = noise(600, 4, 1)
        loss = adversary(nn.functional.avg_pool1d(real, 5, 1, 2), real)[1]["discriminator"]
        total = adversary(nn.functional.avg_pool1d(real, 5, 1, 2), real)[0]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.7 * first


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="window=100 is no power of two"):
        SoundDiscriminator(window=100)
