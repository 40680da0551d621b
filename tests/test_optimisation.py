import math

import pytest
import torch
from torch import nn

from reelm.engine.optimisation import MuonAdamW, Optimisation, orthogonalised, schedule_factor


def factors(kind: str, steps: int = 100, warmup: int = 10, cooldown: float = 0.3, floor: float = 0.1) -> list[float]:
    factor = schedule_factor(kind, warmup, steps, cooldown, floor)
    return [factor(step) for step in range(steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(kind):
    values = factors(kind)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and values[10] == 1.0
    assert max(values) == 1.0 and min(values) > 0
    assert factors(kind, warmup=0)[0] == 1.0


def test_cosine_falls_to_the_floor():
    values = factors("cosine")
    assert values[100] == pytest.approx(0.1) and values[55] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(values[10:], values[11:]))
    assert schedule_factor("cosine", 10, 100, 0.3, 0.1)(500) == pytest.approx(0.1)


def test_wsd_is_stable_and_then_falls_in_a_line():
    values = factors("wsd")
    assert values[10:71] == [1.0] * 61
    assert values[70:] == pytest.approx([1 - 0.9 * i / 30 for i in range(31)])
    longer = factors("wsd", steps=200)
    assert longer[:71] == values[:71]  # a run can be prolonged from its stable part


def test_constant_stays():
    assert factors("constant")[10:] == [1.0] * 91


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(*shape) * 1e-3
    found = torch.linalg.svdvals(orthogonalised(matrix, steps=6))
    if shape[0] != shape[1]:  # a square one has a value near 0, which takes more steps
        assert 0.6 < found.min()
    assert found.median() > 0.6 and found.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    aligned = (u.T @ orthogonalised(matrix) @ v.T).diagonal()
    assert aligned.median() > 0.6  # the same singular vectors
    assert orthogonalised(torch.zeros(shape)).abs().max() == 0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Flatten(), nn.Linear(64, 8))
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.head(self.inner(x).tanh())


def setup(muon: bool, **changes) -> tuple[Net, torch.optim.Optimizer, object]:
    torch.manual_seed(2)
    net = Net()
    made = Optimisation(lr=0.01, muon=muon, warmup=2, **changes).configure(net, 50, inner=net.inner)
    assert made["lr_scheduler"]["interval"] == "step"
    return net, made["optimizer"], made["lr_scheduler"]["scheduler"]


def train(net, optimizer, scheduler, steps: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(8, 2, 1, 4, 4, generator=generator), torch.randn(8, 3, generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    return losses


def test_muon_takes_the_inner_matrices_and_convolutions_alone():
    net, optimizer, _ = setup(muon=True)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in groups and groups[id(p)]["momentum"]}
    assert names == {"inner.0.weight", "inner.2.weight"}
    assert {name for name, p in net.named_parameters() if id(p) not in groups} == {"frozen.weight", "frozen.bias"}
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert groups[id(p)]["weight_decay"] == (0.0 if name.endswith("bias") else 0.01), name
    assert not any(group["momentum"] for group in setup(muon=False)[1].param_groups)


def test_every_parameter_moves_and_the_frozen_ones_stay():
    net, optimizer, scheduler = setup(muon=True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, optimizer, scheduler, 1)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_a_convolutions_update_is_orthogonal_and_of_the_size_of_adams():
    net, optimizer, scheduler = setup(muon=True, weight_decay=0.0)
    before = net.inner[0].weight.detach().clone()
    train(net, optimizer, scheduler, 1)
    update = (net.inner[0].weight.detach() - before).flatten(1)
    lr = 0.01 / 2  # the first of two steps of warm-up
    values = torch.linalg.svdvals(update) / (lr * 0.2 * max(update.shape) ** 0.5)
    assert 0.5 < values.median() and values.max() < 1.3
    assert 0.1 * lr < update.square().mean().sqrt() < 0.4 * lr


def test_a_closure_zeroes_all_gradients():
    net, optimizer, scheduler = setup(muon=True)
    for p in net.parameters():
        p.grad = torch.full_like(p, math.nan) if p.requires_grad else None  # would spoil what is not zeroed
    train(net, optimizer, scheduler, 1)
    assert all(p.isfinite().all() for p in net.parameters())
    assert len(optimizer.param_groups) == 3


def test_groups_survive_a_closure_that_fails():
    _, optimizer, _ = setup(muon=True)

    def closure():
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("muon", [False, True])
def test_training_goes_on_exactly_from_its_saved_state(muon, tmp_path):
    net, optimizer, scheduler = setup(muon)
    train(net, optimizer, scheduler, 3)
    path = tmp_path / "state.pt"
    torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], path)
    expected = train(net, optimizer, scheduler, 3, seed=1)
    resumed = setup(muon)
    for part, state in zip(resumed, torch.load(path, weights_only=True)):
        part.load_state_dict(state)
    assert train(*resumed, 3, seed=1) == expected
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed[0].parameters()))


@pytest.mark.parametrize("muon", [False, True])
def test_one_step_lowers_a_quadratic(muon):
    weight = nn.Parameter(torch.randn(6, 10))
    target = torch.randn(6, 10)
    group = {"params": [weight], "momentum": 0.95 if muon else 0.0, "weight_decay": 0.0}
    optimizer = MuonAdamW([group], lr=0.05)
    losses = []
    for _ in range(10):
        loss = (weight - target).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0] and losses[-1] < losses[1]


def test_muon_decays_weights():
    weight = nn.Parameter(torch.randn(4, 4))
    before = weight.detach().clone()
    optimizer = MuonAdamW([{"params": [weight], "momentum": 0.95, "weight_decay": 0.5}], lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * 0.95)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="cosine, wsd or constant; got linear"):
        Optimisation(schedule="linear")
