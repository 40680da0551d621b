import pytest
import torch

from reelm.tokenizers.magvit2 import MAGVIT2, AdaptiveNorm, FrameNorm, HaarPatch, haar_basis
from reelm.tokenizers.quantizers import FSQ, LFQ
from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.tokens import Tokens
from reelm.tokenizers.vivit import ViViT

VARIANTS = {
    "patch": {
        "patch": (4, 4, 4), "channels": (16, 16), "strides": ((1, 2, 2),), "blocks": (1, 1),
        "kernels": ((1, 3, 3), (3, 3, 3)),
    },
    "no patch": {
        "channels": (8, 8, 16), "strides": ((1, 2, 2), (2, 2, 2)), "blocks": (1, 1, 1), "kernels": ((3, 3, 3),) * 3,
    },
    "patch and stride": {
        "patch": (2, 2, 2), "channels": (8, 16), "strides": ((2, 2, 2),), "blocks": (1, 1), "kernels": ((3, 3, 3),) * 2,
    },
    "adaptive norm": {
        "patch": (2, 1, 1), "channels": (8, 8, 16), "strides": ((1, 2, 2), (2, 2, 2)), "blocks": (1, 1, 1),
        "kernels": ((3, 3, 3),) * 3, "adaptive": True,
    },
}  # fmt: skip


TRANSFORMERS = {
    "c-vivit": {"patch": (2, 8, 8), "layers": "sstt", "window": 3},
    "st-vivit": {"patch": (1, 4, 4), "layers": "stst", "window": 2},
}


def make(variant: str = "patch", bits: int = 8) -> VideoTokenizer:
    torch.manual_seed(1)
    if variant in TRANSFORMERS:
        return ViViT(LFQ(bits), width=32, heads=2, **TRANSFORMERS[variant])
    model = MAGVIT2(LFQ(bits), **VARIANTS[variant])
    for part in model.modules():
        if isinstance(part, AdaptiveNorm):  # which begins as a plain one
            torch.nn.init.normal_(part.style.weight, std=0.3)
    return model


def noise(frames: int, size: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size) * 2 - 1


@pytest.fixture(params=[*VARIANTS, *TRANSFORMERS])
def tokenizer(request) -> VideoTokenizer:
    return make(request.param).eval()


def test_a_prefix_of_frames_has_a_prefix_of_the_tokens(tokenizer):
    step = tokenizer.compression[0]
    video = noise(1 + 3 * step, 32)  # for maps below 4 x 4 oneDNN changes its kernels with the length: 1e-7 apart
    with torch.no_grad():
        latents, ids = tokenizer.encode_latents(video), tokenizer.encode(video)
        pixels = tokenizer.decode(ids)
        assert ids.shape[1] == 4 and pixels.shape == video.shape and pixels.abs().max() <= 1
        for k in range(4):  # k = 0: an image
            part = video[:, :, : 1 + k * step]
            assert torch.equal(tokenizer.encode_latents(part), latents[:, :, : 1 + k])
            assert torch.equal(tokenizer.encode(part), ids[:, : 1 + k])
            assert torch.equal(tokenizer.decode(ids[:, : 1 + k]), pixels[:, :, : 1 + k * step])


def test_a_later_frame_never_changes_earlier_tokens_or_pixels(tokenizer):
    step = tokenizer.compression[0]
    video = noise(1 + 2 * step)
    changed = torch.cat([video[:, :, :-1], 100 * noise(1)], 2)
    first = torch.cat([100 * noise(1), video[:, :, 1:]], 2)
    with torch.no_grad():
        latents, other = tokenizer.encode_latents(video), tokenizer.encode_latents(changed)
        assert torch.equal(latents[:, :, :2], other[:, :, :2]) and not torch.equal(latents[:, :, 2], other[:, :, 2])
        assert not torch.equal(latents[:, :, 2], tokenizer.encode_latents(first)[:, :, 2])  # but time is seen
        pixels, changed = (tokenizer.decode_latents(z) for z in (latents, other))
    assert torch.equal(pixels[:, :, : 1 + step], changed[:, :, : 1 + step])
    assert not torch.equal(pixels[:, :, 1 + step :], changed[:, :, 1 + step :])


def test_an_adaptive_norm_is_told_by_the_latents_of_its_place():
    norm = AdaptiveNorm(8, 4, (2, 2, 2))
    x, latents = torch.randn(1, 8, 3, 4, 4), torch.randn(1, 4, 2, 2, 2)
    assert torch.equal(norm(x, latents), FrameNorm(8)(x))  # it begins as a plain norm
    torch.nn.init.normal_(norm.style.weight)
    other = latents.clone()
    other[:, :, 1, 0, 1] += 1
    changed = (norm(x, latents) != norm(x, other)).any(1)[0]
    expected = torch.zeros(3, 4, 4, dtype=torch.bool)
    expected[1:, :2, 2:] = True  # frames 1 and 2 are of latent frame 1
    assert torch.equal(changed, expected)


def test_samples_of_a_batch_do_not_meet(tokenizer):
    video = noise(1 + tokenizer.compression[0])
    assert torch.equal(tokenizer.encode(video)[1:], tokenizer.encode(video[1:]))


def test_the_grid_is_what_encode_makes(tokenizer):
    t, h, w = tokenizer.compression
    video = noise(1 + 2 * t, 2 * h, 1)
    assert tuple(tokenizer.encode(video).shape[1:]) == tokenizer.grid(1 + 2 * t, 2 * h, 2 * w) == (3, 2, 2)


@pytest.mark.parametrize("shape", [(4, 16, 16), (5, 15, 16), (5, 16, 12), (0, 16, 16)])
def test_sizes_that_do_not_fit_are_refused_in_one_line(shape):
    tokenizer = make()
    with pytest.raises(ValueError, match=r"1 \+ 4k frames of multiples of 8 x 8") as error:
        tokenizer.encode(torch.zeros(1, 3, *shape))
    assert "\n" not in str(error.value) and str(shape[0]) in str(error.value)


def test_levels_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="2 channels ask for 1 strides"):
        MAGVIT2(LFQ(4), channels=(8, 8))
    with pytest.raises(ValueError, match="powers of two; got 3"):
        MAGVIT2(LFQ(4), **{**VARIANTS["patch"], "patch": (4, 3, 3)})


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_haar_basis_is_orthonormal(size):
    torch.testing.assert_close(haar_basis(size) @ haar_basis(size).T, torch.eye(size))


@pytest.mark.parametrize("patch", [(1, 1, 1), (4, 4, 4), (2, 4, 1)])
def test_haar_patches_keep_energy_and_are_inverted(patch):
    haar = HaarPatch(patch)
    video = noise(1 + 2 * patch[0], 8)
    coefficients = haar(video)
    assert coefficients.shape == (2, 3 * patch[0] * patch[1] * patch[2], 3, 8 // patch[1], 8 // patch[2])
    torch.testing.assert_close(haar.inverse(coefficients), video, rtol=0, atol=2e-6)
    torch.testing.assert_close(coefficients[:, :, 1:].square().sum(), video[:, :, 1:].square().sum())


def test_gradients_reach_every_parameter(tokenizer):
    tokenizer.train()
    video = noise(1 + 2 * tokenizer.compression[0])
    reconstruction, ids, losses = tokenizer(video)
    (reconstruction.sub(video).square().mean() + sum(losses.values())).backward()
    assert reconstruction.shape == video.shape and ids.max() < tokenizer.vocabulary
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_tiny_model_overfits_one_clip():
    tokenizer = make(bits=8)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    video = torch.stack([(x - t / 4).sin() * y.cos() for t in range(5)]).expand(1, 3, 5, 16, 16).contiguous()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    errors = []
    for _ in range(60):
        reconstruction, _, losses = tokenizer(video)
        errors.append((reconstruction - video).square().mean())
        optimizer.zero_grad()
        (errors[-1] + 0.1 * losses["commitment"]).backward()
        optimizer.step()
    assert errors[-1] < errors[0] / 5


def test_training_in_bfloat16(tokenizer):
    video = noise(1 + tokenizer.compression[0])
    tokenizer.train()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, _, losses = tokenizer(video)
    (reconstruction.float().square().mean() + sum(losses.values())).backward()
    assert reconstruction.isfinite().all() and all(p.grad.isfinite().all() for p in tokenizer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.decode(tokenizer.encode(video)).dtype == torch.float32


def test_any_quantizer_fits():
    tokenizer = MAGVIT2(FSQ((4, 3)), **VARIANTS["patch"]).eval()
    ids = tokenizer.encode(noise(5))
    assert tokenizer.vocabulary == 12 and ids.max() < 12
    assert tokenizer.decode(ids).shape == (2, 3, 5, 16, 16)


def test_tokens_know_their_places():
    tokens = Tokens(torch.arange(12).view(1, 3, 2, 2))
    places = Tokens.positions(tokens.grid)
    for id, (t, h, w) in zip(tokens.flat()[0].tolist(), places.tolist(), strict=True):
        assert tokens.ids[0, t, h, w] == id
    with pytest.raises(ValueError, match=r"\(B, T, H, W\)"):
        Tokens(torch.zeros(3, 2, 2))
