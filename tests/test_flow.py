"""Flow matching, solvers and guidance, against closed forms and against diffusers."""

import pytest
import torch
from torch import nn

from reelm.diffusion.conditions import Conditions
from reelm.diffusion.model import Diffusion
from reelm.diffusion.objectives import Flow
from reelm.diffusion.solvers import Denoising, solve

MEAN, STD = 1.5, 0.4


def exact(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """E[noise - clean | noisy] where clean is N(MEAN, STD^2)."""
    t = time.view(-1, *[1] * (noisy.ndim - 1))
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (noisy - (1 - t) * MEAN)


@pytest.mark.parametrize("solver, steps", [("euler", 400), ("heun", 40)])
def test_the_exact_velocity_carries_noise_to_the_data(solver, steps):
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    made = solve(exact, noise, Flow().schedule(steps).double(), solver)
    torch.testing.assert_close(made, MEAN + STD * noise, atol=0.02, rtol=0)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_solvers_have_their_order(solver, order):
    noise = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    errors = [
        float((solve(exact, noise, Flow().schedule(steps).double(), solver) - MEAN - STD * noise).abs().max())
        for steps in (64, 128)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_the_loss_is_least_at_the_exact_velocity_and_its_least_is_known():
    flow, count = Flow("uniform"), 200_000
    clean, noise, time = MEAN + STD * torch.randn(count, 1), torch.randn(count, 1), torch.full((count,), 0.3)
    least = STD**2 / (0.7**2 * STD**2 + 0.3**2)  # Var[noise - clean | noisy]
    assert float(flow.loss(exact, clean, noise, time).mean()) == pytest.approx(least, rel=0.02)
    other = flow.loss(lambda x, t: exact(x, t) + 0.5, clean, noise, time)
    assert float(other.mean()) == pytest.approx(least + 0.25, rel=0.02)


def test_a_learned_velocity_carries_noise_to_the_data():
    network = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    flow, optimizer = Flow("uniform"), torch.optim.Adam(network.parameters(), 1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)

    def velocity(noisy, time):
        return network(torch.stack([noisy[:, 0], time], 1))

    for _ in range(300):
        clean, noise = MEAN + STD * torch.randn(512, 1), torch.randn(512, 1)
        loss = flow.loss(velocity, clean, noise, flow.times(512)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        made = solve(velocity, torch.randn(4000, 1), flow.schedule(20), "heun")
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.06) and float(made.std()) == pytest.approx(STD, abs=0.06)


@pytest.mark.parametrize("drawn, low", [("uniform", 0.25), ("logit_normal", torch.sigmoid(torch.tensor(-0.6745)))])
def test_times_have_their_distribution_and_are_spread(drawn, low):
    times = Flow(drawn).times(1000)
    assert times.min() > 0 and times.max() < 1
    assert float(times.quantile(0.25)) == pytest.approx(float(low), abs=0.005)  # one draw of each thousandth part
    assert float(Flow(drawn, shift=3.0).times(1000).median()) == pytest.approx(0.75, abs=0.005)


def test_euler_is_the_scheduler_of_diffusers():
    schedulers = pytest.importorskip("diffusers.schedulers")
    for shift, steps in ((1.0, 12), (3.0, 7)):
        scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        theirs = noise = torch.randn(5, 2, 1, 3, 3)
        for t in scheduler.timesteps:
            theirs = scheduler.step(exact(theirs, (t / 1000).expand(5)), t, theirs).prev_sample
        times = Flow(shift=shift).schedule(steps)
        torch.testing.assert_close(scheduler.sigmas, times)
        torch.testing.assert_close(solve(exact, noise, times), theirs)


class Remembering(nn.Module):
    """A denoiser that notes what it is asked, and whose answer is whether there is text."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, noisy, time, conditions):
        self.asked.append((noisy, time))
        text = conditions.text_mask.any(1).float() if conditions.text_mask is not None else noisy.new_zeros(len(noisy))
        return text.view(-1, 1, 1, 1, 1).expand_as(noisy) * 1.0


def test_known_latents_are_kept_seen_clean_and_not_counted():
    denoiser, clean = Remembering(), torch.randn(2, 3, 4, 2, 2)
    kept = torch.tensor([[True, True, False, False], [True, False, False, False]])
    where = kept[:, None, :, None, None].expand_as(clean)
    conditions, model = Conditions(known=clean * where, kept=kept), Diffusion(denoiser, Flow())
    steps = []
    made = model.sample(torch.randn_like(clean), conditions, Denoising(3), lambda step, _: steps.append(step))
    assert torch.equal(made[where], clean[where]) and not torch.isclose(made, clean)[~where].any()
    assert steps == [1, 2, 3]
    loss, metrics = model.loss(clean, conditions)
    for noisy, time in denoiser.asked:
        assert torch.equal(noisy[where], clean[where]) and time.shape == (2, 4)
        assert not time[kept].any() and (time[~kept] > 0).all()
    torch.manual_seed(1)
    loss = model.loss(clean, conditions)[0]
    torch.manual_seed(1)
    other = model.loss(torch.where(where, 9.0, clean), conditions)[0]
    assert torch.equal(loss, other) and loss == metrics["mse"].new_tensor(float(loss))
    with pytest.raises(ValueError, match="nothing is left to make"):
        model.loss(clean, Conditions(known=clean, kept=torch.ones_like(kept)))


def test_guidance_goes_beyond_the_text():
    denoiser = Remembering()
    model, noise = Diffusion(denoiser, Flow()), torch.zeros(2, 1, 1, 1, 1)
    text = Conditions(text=torch.zeros(2, 4, dtype=torch.long), text_mask=torch.tensor([[True] * 4, [False] * 4]))
    made = model.sample(noise, text, Denoising(4, guidance=3.0)).flatten()
    assert made.tolist() == [-3.0, 0.0]  # 1 with a text, 0 without: 0 + 3 (1 - 0), from time 1 to 0
    assert model.sample(noise, text, Denoising(4)).flatten().tolist() == [-1.0, 0.0]
    assert [len(noisy) for noisy, _ in denoiser.asked] == [4] * 4 + [2] * 4
    model.sample(noise, text.without_text(), Denoising(1, guidance=3.0))
    assert len(denoiser.asked[-1][0]) == 2  # nothing to guide by: no second half


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Denoising(0), "steps is 1 or more"),
        (lambda: Denoising(solver="rk4"), "solver is one of euler, heun"),
        (lambda: Denoising(guidance=-1), "guidance is a number from 0 on"),
        (lambda: Flow("often"), "times are drawn logit_normal or uniform"),
        (lambda: Flow(std=0), "std and shift are more than 0"),
        (lambda: Conditions(kept=torch.ones(1, 1)), "give known with kept"),
        (lambda: Conditions(text=torch.ones(1, 1)), "give text and text_mask"),
        (lambda: Conditions.cat([Conditions(), Conditions(fps=torch.ones(1))]), "have fps or none has"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
