import pytest
import torch

from reelm.diffusion.conditions import Conditions
from reelm.diffusion.dit import Block, DiT
from reelm.diffusion.layers import turns

SIZES = {"channels": 3, "frames": 4, "pieces": 20, "width": 24, "heads": 2, "layers": "jst", "text_depth": 1}


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """With random numbers for the weights that begin at zero."""
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.3)
    return model.eval()


def told(batch: int = 2, grid: tuple[int, int, int] = (3, 4, 6)) -> Conditions:
    shape = (batch, 3, *grid)
    return Conditions(
        text=torch.randint(20, (batch, 8)), text_mask=torch.arange(8).expand(batch, -1) < 5,
        known=torch.randn(shape), shares=torch.rand(batch, 4, *grid), control=torch.randn(shape),
        kept=torch.arange(grid[0]).expand(batch, -1) < 1, fps=torch.full((batch,), 8.0),
    )  # fmt: skip


def test_a_block_begins_as_the_identity_and_the_model_at_zero():
    block = Block(24, 2, 4.0, "j")
    x, angles = torch.randn(2, 3, 4, 4, 24), turns((3, 4, 4), 12, 100.0, torch.device("cpu"))
    text, mask = torch.randn(2, 5, 24), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(block(x, torch.randn(2, 1, 1, 1, 24), angles, text, mask), x)
    assert not DiT(**SIZES)(torch.randn(2, 3, 3, 4, 6), torch.rand(2), told()).any()


def test_the_same_weights_take_any_length_and_size():
    model = awake(DiT(**SIZES, patch=2))
    for grid in ((1, 4, 4), (3, 4, 6), (5, 2, 8)):
        assert model(torch.randn(2, 3, *grid), torch.rand(2), told(2, grid)).shape == (2, 3, *grid)
    with pytest.raises(ValueError, match="no whole patches of 2"):
        model(torch.randn(1, 3, 1, 3, 4), torch.rand(1))


def test_patches_are_put_back_where_they_came_from():
    model = awake(DiT(**SIZES, patch=2))
    noisy = torch.randn(1, 3, 2, 4, 6)
    tokens = model._patches(noisy, Conditions()).unflatten(-1, (-1, 2, 2))[..., :3, :, :]  # (B, t, h, w, D, 2, 2)
    assert torch.equal(tokens.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4), noisy)


@pytest.mark.parametrize("layers, mixed", [("j", "thw"), ("s", "hw"), ("t", "t"), ("st", "thw")])
def test_layers_mix_what_they_say(layers, mixed):
    model = awake(DiT(**(SIZES | {"layers": layers})))
    noisy = torch.randn(1, 3, 3, 4, 6)
    other = noisy.clone()
    other[:, :, 1, 2, 3] += 1.0
    moved = (model(noisy, torch.tensor([0.5])) - model(other, torch.tensor([0.5]))).abs().amax((0, 1)) > 1e-6
    assert moved[1, 2, 3]
    assert bool(moved[0, 2, 3]) == ("t" in mixed)
    assert bool(moved[1, 0, 0]) == ("hw" in mixed)
    assert bool(moved[0, 0, 0]) == (mixed == "thw")


def test_position_counts():
    model = awake(DiT(**SIZES))
    noisy = torch.randn(1, 3, 3, 4, 6)
    time = torch.tensor([0.5])
    for axis in (2, 3, 4):
        assert not torch.allclose(model(noisy.flip(axis), time).flip(axis), model(noisy, time), atol=1e-4)


def test_everything_that_is_told_counts():
    model, noisy, time, all_of_it = awake(DiT(**SIZES)), torch.randn(2, 3, 3, 4, 6), torch.rand(2), told()
    out = model(noisy, time, all_of_it)
    changes = {
        "text": all_of_it.text.flip(1), "text_mask": torch.zeros(2, 8, dtype=torch.bool), "shares": None,
        "known": -all_of_it.known, "control": None, "fps": torch.full((2,), 24.0),
    }  # fmt: skip
    for name, value in changes.items():
        assert not torch.allclose(model(noisy, time, all_of_it.replace(**{name: value})), out, atol=1e-4), name
    assert not torch.allclose(model(noisy, 1 - time, all_of_it), out, atol=1e-4)


def test_padding_of_text_does_not_count():
    model, noisy, time, some = awake(DiT(**SIZES)), torch.randn(2, 3, 3, 4, 6), torch.rand(2), told()
    longer = some.replace(
        text=torch.nn.functional.pad(some.text, (0, 8), value=7),
        text_mask=torch.nn.functional.pad(some.text_mask, (0, 8)),
    )
    torch.testing.assert_close(model(noisy, time, longer), model(noisy, time, some), atol=1e-5, rtol=1e-4)
    without = model(noisy, time, some.without_text())
    none = some.replace(text=None, text_mask=None)
    torch.testing.assert_close(model(noisy, time, none), without, atol=1e-5, rtol=1e-4)


def test_each_frame_may_have_its_time():
    model, noisy = awake(DiT(**SIZES)), torch.randn(2, 3, 3, 4, 6)
    time = torch.rand(2)
    spread = model(noisy, time[:, None].expand(-1, 3))
    torch.testing.assert_close(model(noisy, time), spread)
    assert not torch.allclose(model(noisy, torch.rand(2, 3)), spread, atol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    model, noisy, time, all_of_it = awake(DiT(**SIZES)).train(), torch.randn(2, 3, 3, 4, 6), torch.rand(2), told()
    gradients = []
    for model.checkpointing in (False, True):
        loss = model(noisy, time, all_of_it).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradients_reach_everything():
    model = awake(DiT(**SIZES)).train()
    model(torch.randn(2, 3, 3, 4, 6), torch.rand(2), told()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_embedded_text():
    model = awake(DiT(**(SIZES | {"pieces": 0, "text_width": 10})))
    noisy, time = torch.randn(2, 3, 1, 4, 4), torch.rand(2)
    text = Conditions(text=torch.randn(2, 8, 10), text_mask=torch.ones(2, 8, dtype=torch.bool))
    assert not torch.allclose(model(noisy, time, text), model(noisy, time), atol=1e-4)
    with pytest.raises(ValueError, match="text of the other kind"):
        model(noisy, time, text.replace(text=torch.zeros(2, 8, dtype=torch.long)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"width": 25}, "width 25 must be a multiple of heads 2"),
        ({"layers": "jx"}, "layers are a letter for each block"),
        ({"layers": ""}, "layers are a letter for each block"),
        ({"patch": 0}, "patch is 1 or more"),
        ({"text_width": 8}, "text comes as word pieces or as vectors"),
    ],
)
def test_mistakes_are_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        DiT(**(SIZES | wrong))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="latents of 3 channels; these have 5"):
        DiT(**SIZES)(torch.randn(1, 5, 1, 4, 4), torch.rand(1))
