"""The adversary: its gradients go where they belong, its losses are those of the papers."""

import math

import pytest
import torch
from torch import nn

from reelm.tokenizers.discriminator import (
    Adversary,
    Discriminator,
    blur_pool,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)


def small(**options) -> Discriminator:
    return Discriminator((8, 8, 8), ((1, 2, 2), (2, 2, 2)), groups=4, head=(1, 2, 2), **options)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize("shape", [(5, 8, 8), (1, 7, 6)])
def test_blur_pooling_is_a_binomial_filter(stride, shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    kernel = torch.ones(1, 1, 1, dtype=torch.float64)
    for axis, s in enumerate(stride):
        taps = torch.tensor([1.0, 2.0, 1.0] if s == 2 else [0.0, 4.0, 0.0], dtype=torch.float64) / 4
        kernel = kernel * taps.view([3 if i == axis else 1 for i in range(3)])
    padded = nn.functional.pad(x, (1,) * 6, mode="replicate")
    want = nn.functional.conv3d(padded, kernel.expand(3, 1, 3, 3, 3), stride=stride, groups=3)
    torch.testing.assert_close(blur_pool(x, stride), want)


def test_blur_pooling_hardly_sees_a_shift():
    """What strided sampling would show as a flicker (alternating signs) is gone."""
    x = torch.ones(1, 1, 1, 8, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    assert blur_pool(x, (1, 2, 2))[..., 1:].abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 3, 17, 64, 64), (3, 3, 1, 16, 24), (2, 3, 5, 33, 40)])
def test_any_size_gets_one_score_a_clip(shape):
    assert small()(torch.rand(shape)).shape == (shape[0], 1)


def test_without_a_head_each_place_is_judged_by_what_is_around_it():
    net = Discriminator((8, 8), ((1, 2, 2),), groups=4, head=None, patch=(2, 2)).eval()
    real = torch.rand(2, 3, 5, 32, 64)
    changed = real.clone()
    changed[..., -1] += 1
    before, after = (net(video).unflatten(1, (5, 8, 16)) for video in (real, changed))
    assert not torch.equal(before[..., -1], after[..., -1])
    seen = (before - after).abs().amax((0, 1, 2))
    # the norms look at the whole, so that all places change a little, but those near the change most
    assert seen[-2:].max() > 5 * seen[:8].max()


def test_it_looks_at_a_part_of_the_frames():
    adversary = Adversary(small(), r1=0.0, frames=3)
    fake = torch.rand(1, 3, 9, 16, 16, requires_grad=True)
    adversary(fake, torch.rand(1, 3, 9, 16, 16))[0].backward()
    touched = fake.grad.abs().amax((0, 1, 3, 4)) > 0
    first = int(touched.float().argmax())
    assert touched.sum() == 3 and touched[first : first + 3].all()


def test_losses_by_the_formula():
    real, fake = torch.tensor([0.3, 2.0]), torch.tensor([-0.5, 1.5])
    logistic = (
        sum(math.log1p(math.exp(-x)) for x in (0.3, 2.0)) / 2 + sum(math.log1p(math.exp(x)) for x in (-0.5, 1.5)) / 2
    )
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(logistic)
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.7 + 0) / 2 + (0.5 + 2.5) / 2)
    assert generator_loss(fake, "hinge").item() == pytest.approx(-0.5)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(
        (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-1.5))) / 2
    )


def test_the_gradient_penalty_of_a_linear_score_is_its_slope():
    slope = torch.randn(3 * 2 * 4 * 4)
    real = torch.rand(5, 3, 2, 4, 4)
    penalty = gradient_penalty(lambda video: video.flatten(1) @ slope, real)
    assert penalty.item() == pytest.approx(0.5 * slope.square().sum().item(), rel=1e-5)


def test_the_gradient_penalty_trains_the_discriminator():
    net, real = small(), torch.rand(2, 3, 5, 16, 16)
    before = gradient_penalty(net, real)
    before.backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / (p.grad.norm() + 1e-12)
    assert gradient_penalty(net, real) < before


@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_one_pass_gives_both_players_their_own_gradients(kind):
    torch.manual_seed(0)
    adversary = Adversary(small(), kind, weight=0.7, r1=0.0, lecam=0.0)
    real, fake = torch.rand(2, 3, 5, 16, 16), torch.rand(2, 3, 5, 16, 16, requires_grad=True)
    adversary(fake, real)[0].backward()
    together = [p.grad.clone() for p in adversary.parameters()]
    (of_fake,) = torch.autograd.grad(0.7 * generator_loss(adversary.discriminator(fake), kind), fake)
    torch.testing.assert_close(fake.grad, of_fake)
    loss = discriminator_loss(adversary.discriminator(real), adversary.discriminator(fake.detach()), kind)
    alone = torch.autograd.grad(loss, list(adversary.parameters()))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


def test_lecam_pulls_scores_towards_the_other_side_s_average():
    adversary = Adversary(small(), r1=0.0, lecam=1.0, decay=0.9)
    adversary.real_mean.fill_(3.0)
    adversary.fake_mean.fill_(-2.0)
    real, fake = torch.rand(2, 3, 5, 16, 16), torch.rand(2, 3, 5, 16, 16)
    _, terms = adversary(fake, real)
    high, low = terms["real_score"].item() + 2.0, 3.0 - terms["fake_score"].item()
    assert terms["lecam"].item() == pytest.approx(max(high, 0) ** 2 + max(low, 0) ** 2, rel=1e-5)
    assert adversary.real_mean.item() == pytest.approx(0.9 * 3.0 + 0.1 * terms["real_score"].item(), rel=1e-5)


def test_the_generator_listens_from_its_step_on_and_penalties_come_now_and_then():
    adversary = Adversary(small(), start=2, every=3)
    real, found = torch.rand(1, 3, 5, 16, 16), []
    for _ in range(4):
        fake = torch.rand(1, 3, 5, 16, 16, requires_grad=True)
        total, terms = adversary(fake, real)
        total.backward()
        found.append((fake.grad.abs().max().item() > 0, "r1" in terms))
    assert found == [(False, True), (False, False), (True, False), (True, True)]
    adversary.eval()
    assert "r1" not in adversary(real, real)[1] and adversary.steps == 4


def test_it_learns_to_tell_blurred_from_sharp():
    torch.manual_seed(0)
    adversary = Adversary(small(), r1=0.01, every=4)
    optimizer = torch.optim.Adam(adversary.parameters(), 2e-3, betas=(0.0, 0.99))
    for _ in range(60):
        real = torch.rand(4, 3, 5, 16, 16) * 2 - 1
        total, terms = adversary(nn.functional.avg_pool3d(real, (1, 3, 3), 1, (0, 1, 1)), real)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert terms["real_score"] > terms["fake_score"] + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Discriminator((8, 8), ()), "2 channels ask for 1 strides; got 0"),
        (lambda: blur_pool(torch.zeros(1, 1, 4, 4, 4), (1, 4, 4)), "strides are 1 or 2"),
        (lambda: Adversary(small(), "wgan"), "kind is non_saturating or hinge; got wgan"),
        (lambda: Adversary(small(), every=0), "every is at least 1; got 0"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
