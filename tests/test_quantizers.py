import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from vector_quantize_pytorch import LFQ as LibraryLFQ

from reelm.tokenizers.quantizers import FSQ, LFQ, VQ, ResidualVQ, binary_entropy, lfq_entropy


def brute_force(z, temperature):
    """Both entropies from the softmax over all 2^D codes with logits 2 z.c / temperature, in float64."""
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=z.shape[1])), dtype=torch.float64)
    p = (2 * z.double() @ codes.T / temperature).softmax(-1)

    def entropy(q):
        return -torch.special.xlogy(q, q).sum(-1)

    return entropy(p).mean(), entropy(p.mean(0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_entropies_are_those_of_all_codes(temperature):
    z = torch.randn(50, 6)
    sample, batch = lfq_entropy(z, temperature, group=6)
    expected_sample, expected_batch = brute_force(z, temperature)
    assert sample.item() == pytest.approx(expected_sample.item(), abs=1e-5)
    assert batch.item() == pytest.approx(expected_batch.item(), abs=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_groups_give_an_upper_bound_on_the_batch_entropy_and_keep_the_sample_entropy(group):
    z = torch.randn(50, 3).repeat(1, 2)  # bits 3 to 5 repeat bits 0 to 2
    exact_sample, exact_batch = brute_force(z, 0.5)
    sample, batch = lfq_entropy(z, 0.5, group=group)
    assert sample.item() == pytest.approx(exact_sample.item(), abs=1e-5)
    assert batch > exact_batch + 0.1


def test_groups_of_independent_bits_are_exact():
    bits = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))) * 0.3  # every combination once: independent
    _, batch = lfq_entropy(bits, 1.0, group=2)
    assert batch.item() == pytest.approx(brute_force(bits, 1.0)[1].item(), abs=1e-5)


def test_the_loss_falls_when_samples_are_sure_and_when_codes_spread():
    def loss(z):
        sample, batch = lfq_entropy(z, 1.0)
        return sample - batch

    same = torch.ones(2, 4)
    apart = torch.stack([torch.ones(4), -torch.ones(4)])
    assert loss(apart) < loss(same) - 0.5
    z = torch.full((8, 4), 0.2) + 0.01 * torch.randn(8, 4)
    z.requires_grad_()
    lfq_entropy(z, 1.0)[1].backward()
    assert (z.grad.mean(0) < 0).all()  # the batch entropy grows when bits that are all 1 move towards 0
    unsure = torch.full((2, 4), 0.1, requires_grad=True)
    lfq_entropy(unsure, 1.0)[0].backward()
    assert (unsure.grad < 0).all()  # the sample entropy falls when bits move away from 0


def test_entropies_stay_finite_far_from_zero():
    z = torch.tensor([[1e4, -1e4, 50.0], [0.0, 1e-8, -50.0]], requires_grad=True)
    sample, batch = lfq_entropy(z, 0.01)
    (sample - batch).backward()
    assert sample.isfinite() and batch.isfinite() and z.grad.isfinite().all()
    assert binary_entropy(torch.tensor(0.0)).item() == pytest.approx(0.6931472)


def test_entropy_of_18_bits_makes_no_table_of_all_codes():
    class Largest(TorchFunctionMode):
        elements, calls = 0, 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.calls += 1
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    z = torch.randn(2560, 18)
    with Largest() as seen:
        lfq_entropy(z, 0.01)
    assert seen.elements <= 2560 * 2**9  # the library's table has 512 times as many
    assert seen.calls < 200


def test_agreement_with_the_library():
    bits, temperature = 6, 0.5
    ours, library = LFQ(bits, temperature), LibraryLFQ(dim=bits, codebook_size=2**bits, num_codebooks=1)
    z = torch.randn(2, bits, 3, 4, 5, requires_grad=True)
    quantized, ids, losses = ours(z)
    (theirs, their_ids, _), breakdown = library(z, inv_temperature=1 / temperature, return_loss_breakdown=True)
    reversed_ids = sum(((their_ids >> i) & 1) << (bits - 1 - i) for i in range(bits))  # its first bit counts most
    assert torch.equal(ids, reversed_ids.long())
    torch.testing.assert_close(quantized, theirs)
    torch.testing.assert_close(ours.lookup(ids), library.indices_to_codes(their_ids))
    assert losses["sample_entropy"].item() == pytest.approx(breakdown.per_sample_entropy.item(), abs=1e-3)
    assert losses["batch_entropy"].item() == pytest.approx(breakdown.batch_entropy.item(), abs=1e-3)
    terms = [losses["sample_entropy"] - losses["batch_entropy"], breakdown.per_sample_entropy - breakdown.batch_entropy]
    torch.testing.assert_close(*(torch.autograd.grad(term, z)[0] for term in terms), atol=2e-5, rtol=1e-2)


@pytest.mark.parametrize("bits", [1, 8, 18])
def test_lfq_ids_and_codes(bits):
    quantizer = LFQ(bits).eval()
    ids = torch.randint(0, 2**bits, (2, 3, 4, 5))
    codes = quantizer.lookup(ids)
    assert codes.shape == (2, bits, 3, 4, 5) and (codes.abs() == 1).all()
    quantized, again, losses = quantizer(codes * torch.rand(codes.shape).clamp_min(1e-3))
    assert torch.equal(again, ids) and not losses
    torch.testing.assert_close(quantized, codes)


def test_the_first_channel_is_the_lowest_bit_and_zero_is_minus():
    z = torch.tensor([3.0, 0.0, 1e-30]).view(1, 3, 1, 1, 1)
    assert LFQ(3)(z)[1].item() == 0b101


@pytest.mark.parametrize("quantizer", [LFQ(4), LFQ(4).eval()], ids=["train", "eval"])
def test_lfq_gradients_pass_straight_through(quantizer):
    z = torch.randn(2, 4, 1, 3, 3, requires_grad=True)
    weight = torch.randn_like(z)
    (quantizer(z)[0] * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_lfq_decides_in_float32():
    z = torch.randn(1, 4, 1, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, losses = LFQ(4)(z)
    assert quantized.dtype == torch.float32 and all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("levels", [(8, 5, 5), (3,), (4, 4, 4, 4)])
def test_fsq_round_trip(levels):
    quantizer = FSQ(levels)
    z = 3 * torch.randn(2, len(levels), 2, 3, 4)
    z.requires_grad_()
    quantized, ids, losses = quantizer(z)
    assert quantized.shape == z.shape and ids.shape == (2, 2, 3, 4) and ids.dtype == torch.int64 and not losses
    assert 0 <= ids.min() and ids.max() < quantizer.vocabulary
    torch.testing.assert_close(quantizer.lookup(ids), quantized)
    quantized.sum().backward()
    assert z.grad.abs().sum() > 0
    every = torch.arange(quantizer.vocabulary).view(1, 1, 1, -1)
    assert len(quantizer.lookup(every).flatten(2)[0].T.unique(dim=0)) == quantizer.vocabulary


def trained(**options) -> VQ:
    torch.manual_seed(0)
    quantizer = VQ(dim=4, **options)
    for _ in range(30):
        quantizer(torch.randn(2, 4, 2, 4, 4))
    return quantizer


@pytest.mark.parametrize("options", [{"codes": 16}, {"codes": 16, "cosine": True}, {"codes": 8, "levels": 3}])
def test_vq_round_trip_and_gradients(options):
    quantizer = trained(**options)
    z = torch.randn(2, 4, 2, 3, 5, requires_grad=True)
    weight = torch.randn(2, 4, 2, 3, 5)
    quantized, _, losses = quantizer(z)
    (quantized * weight).sum().backward()
    assert losses["commitment"].isfinite() and quantized.shape == z.shape
    assert torch.equal(z.grad, weight)
    quantized, ids, losses = quantizer.eval()(z.detach())
    assert ids.shape == (2, 2, 3, 5) and 0 <= ids.min() and ids.max() < quantizer.vocabulary and not losses
    torch.testing.assert_close(quantizer.lookup(ids), quantized)


def test_vq_takes_the_nearest_code_and_codes_follow_their_latents():
    quantizer = trained(codes=8).eval()
    table = quantizer.lookup(torch.arange(8).view(1, 1, 1, 8))[0, :, 0, 0].T  # (8, 4)
    z = torch.randn(1, 4, 1, 6, 6)
    nearest = torch.cdist(z.flatten(2)[0].T, table).argmin(-1)
    assert torch.equal(quantizer(z)[1].flatten(), nearest)
    before = (quantizer(z)[0] - z).square().mean()
    quantizer.train()
    for _ in range(300):
        quantizer(z)
    assert (quantizer.eval()(z)[0] - z).square().mean() < before


def test_each_residual_level_quantizes_what_is_left_over():
    quantizer = trained(codes=8, levels=3).eval()
    z = torch.randn(2, 4, 2, 4, 4)
    ids = quantizer(z)[1]
    errors = []
    for kept in (0, 1, 2):  # the ids of the levels up to `kept`, with those of the rest taken away
        levels = [ids // 8**place % 8 for place in (2, 1, 0)]
        codes = [layer._codebook.embed[0] for layer in quantizer.vq.layers]
        partial = sum(codes[k][levels[k]] for k in range(kept + 1)).movedim(-1, 1)
        errors.append((partial - z).square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(quantizer.lookup(ids), partial)


def test_vq_decides_in_float32():
    z = torch.randn(1, 4, 1, 4, 4)
    quantizer = trained(codes=8).eval()
    with torch.autocast("cpu", torch.bfloat16):
        quantized, ids, _ = quantizer(z)
    assert torch.equal(ids, quantizer(z)[1]) and quantized.dtype == torch.float32


def test_vq_mistakes():
    with pytest.raises(ValueError, match="7 levels of 1024 codes cannot be numbered"):
        VQ(levels=7)
    with pytest.raises(ValueError, match="cosine=false"):
        VQ(levels=2, cosine=True)


def levels_of(quantizer: ResidualVQ, z: torch.Tensor, kept: int) -> float:
    ids = quantizer(z)[1]
    return (quantizer.lookup(ids[..., :kept]) - z).square().mean().item()


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 4, 2, 3, 5)])
def test_residual_ids_have_the_levels_last(shape):
    torch.manual_seed(0)
    quantizer = ResidualVQ(8, 4, 3)
    for _ in range(30):
        quantizer(torch.randn(shape))
    z = torch.randn(shape)
    quantized, ids, losses = quantizer.eval()(z)
    assert ids.shape == (shape[0], *shape[2:], 3) and not losses and ids.max() < quantizer.vocabulary == 8
    torch.testing.assert_close(quantizer.lookup(ids), quantized)
    errors = [levels_of(quantizer, z, kept) for kept in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_one_id_and_ids_a_level_are_the_same_codes():
    torch.manual_seed(0)
    numbered, apart = trained(codes=8, levels=3).eval(), ResidualVQ(8, 4, 3).eval()
    apart.load_state_dict(numbered.state_dict())
    z = torch.randn(2, 4, 3, 3, 3)
    ids = apart(z)[1]
    assert torch.equal(numbered(z)[1], ids[..., 0] * 64 + ids[..., 1] * 8 + ids[..., 2])
    assert torch.equal(apart.lookup(ids), numbered.lookup(numbered(z)[1]))


def test_dropped_levels_make_no_ids_and_bypassed_items_pass():
    torch.manual_seed(0)
    quantizer = ResidualVQ(8, 4, 3, dropout=True)
    kept = set()
    for _ in range(30):
        ids = quantizer(torch.randn(4, 4, 50))[1]
        assert ids.min() >= 0
        kept.add(int((ids.flatten(0, 1).amax(0) > 0).sum()))
    assert kept == {1, 2, 3}
    z = torch.randn(64, 4, 5, requires_grad=True)
    quantizer = ResidualVQ(8, 4, 2, bypass=0.5)
    made = quantizer(z)[0]
    passed = (made == z).flatten(1).all(1)
    assert 16 < passed.sum() < 48
    made.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert not (quantizer.eval()(z)[0] == z).flatten(1).all(1).any()


def test_residual_mistakes():
    with pytest.raises(ValueError, match="bypass is a share"):
        ResidualVQ(bypass=1.0)
    with pytest.raises(ValueError, match="ids of 5 levels; this quantizer has 4"):
        ResidualVQ(8, 4).lookup(torch.zeros(1, 2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="0 levels of 8 codes"):
        ResidualVQ(8, 4, 0)
