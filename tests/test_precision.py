"""Within autocast, what bfloat16 would spoil is done in float32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reelm.lm.norm import rms_norm
from reelm.tokenizers.discriminator import Adversary, Discriminator, gradient_penalty
from reelm.tokenizers.magvit2 import MAGVIT2, AdaptiveNorm, FrameNorm, HaarPatch, SiteNorm
from reelm.tokenizers.perceptual import LPIPS, alexnet
from reelm.tokenizers.quantizers import FSQ, LFQ, VQ
from reelm.tokenizers.vivit import ViViT


def low(work: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return work()


NORMS = {
    "frame": FrameNorm(16),
    "site": SiteNorm(16),
    "adaptive": lambda x: AdaptiveNorm(16, 4, (1, 1, 1))(x, torch.zeros(2, 4, *x.shape[2:])),
    "group, of the discriminator": nn.GroupNorm(4, 16),
    "layer, of vivit": lambda x: nn.LayerNorm(16)(x.movedim(1, -1)),
    "rms": lambda x: rms_norm(x.movedim(1, -1), torch.ones(16)),
}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_norms_are_those_of_float32(name):
    """Of values 1000 +- 1, whose variance is nothing in bfloat16 (its numbers there are 4 apart)."""
    x = 1000 + torch.randn(2, 16, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(low(lambda: NORMS[name](x)).float(), NORMS[name](x), rtol=0, atol=1e-4)
        rounded = (1000 + 50 * torch.randn(2, 16, 3, 8, 8)).bfloat16()  # what a convolution within autocast hands on
        exact = NORMS[name](rounded.float())
        torch.testing.assert_close(low(lambda: NORMS[name](rounded)).float(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("quantizer", [LFQ(8, 0.5), FSQ((8, 5, 3)), VQ(16, 4)], ids=["lfq", "fsq", "vq"])
def test_decisions_and_entropies_of_quantizers_are_those_of_float32(quantizer):
    quantizer.train()(torch.randn(2, quantizer.dim, 2, 8, 8))  # the codes of VQ begin
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    z = 0.01 * torch.randn(2, quantizer.dim, 2, 8, 8).bfloat16()
    found = low(lambda: quantizer(z))
    quantizer.load_state_dict(before)
    quantized, ids, losses = quantizer(z.float())
    assert torch.equal(found[1], ids) and found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], quantized)
    for name, value in losses.items():
        assert found[2][name].dtype == torch.float32
        torch.testing.assert_close(found[2][name], value)


@pytest.mark.parametrize(
    "tokenizer",
    [
        MAGVIT2(LFQ(8), (16, 16), ((1, 2, 2),), (1, 1), ((1, 3, 3), (3, 3, 3)), (4, 4, 4)),
        ViViT(LFQ(8), width=32, heads=2),
    ],
    ids=["magvit2", "vivit"],
)
def test_tokens_made_within_autocast_are_those_of_generation(tokenizer):
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    tokenizer.eval()
    assert torch.equal(low(lambda: tokenizer.encode(video)), tokenizer.encode(video))


def test_fine_differences_of_bright_pixels_reach_the_network():
    haar, video = HaarPatch((4, 4, 4)), 0.9 + 0.002 * torch.randn(1, 3, 5, 16, 16)
    coefficients = haar(video)
    assert torch.equal(low(lambda: haar(video)), coefficients)
    torch.testing.assert_close(low(lambda: haar.inverse(coefficients)), video, rtol=0, atol=2e-6)


def test_penalties_of_the_adversary_are_those_of_float32():
    adversary = Adversary(Discriminator((8, 8), ((2, 2, 2),)), lecam=1.0, every=1)
    real, fake = torch.rand(2, 3, 5, 16, 16), torch.rand(2, 3, 5, 16, 16)
    exact = gradient_penalty(adversary.discriminator, real)
    assert low(lambda: gradient_penalty(adversary.discriminator, real)).item() == exact.item()
    adversary.discriminator.forward = lambda video: video.mean((1, 2, 3, 4)).bfloat16()  # a score as autocast gives it
    adversary.r1 = 0.0
    adversary.real_mean.fill_(1000.0)  # of which bfloat16 would swallow the scores
    total, terms = low(lambda: adversary(fake, real))
    scores = [adversary.discriminator(video).float().mean() for video in (real, fake)]
    assert total.dtype == torch.float32 and all(value.dtype == torch.float32 for value in terms.values())
    wanted = (1000 - scores[1]).square() + scores[0].relu().square()
    torch.testing.assert_close(terms["lecam"], wanted, rtol=1e-6, atol=0)


def test_small_perceptual_distances_are_not_lost():
    layers, taps = alexnet()
    lpips = LPIPS.__new__(LPIPS)  # without files
    nn.Module.__init__(lpips)
    lpips.layers, lpips.taps, lpips.frames = layers, taps, None
    lpips.lins = nn.ParameterList(torch.rand(1, n, 1, 1) for n in (64, 192, 384, 256, 256))
    lpips.shift, lpips.scale = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    a = torch.rand(1, 3, 1, 64, 64)
    b = a + 1e-3 * torch.randn_like(a)
    with torch.no_grad():
        exact = lpips(a, b)
        assert low(lambda: lpips(a, b)).item() == exact.item() > 0
