"""The terms of the tokenizer's loss, and the alarm on idle codes."""

import math
import warnings

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.module import Batch
from reelm.engine.optimisation import Optimisation
from reelm.engine.tokenizer_training import TokenizerTraining, idle_digits
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import FSQ, LFQ, VQ


def training(quantizer: torch.nn.Module | None = None, **options) -> TokenizerTraining:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(
        quantizer or LFQ(6, 0.5), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1),
        kernels=((1, 3, 3), (3, 3, 3)),
    )  # fmt: skip
    return TokenizerTraining(tokenizer, Optimisation(), **options)


def loss_of(module: TokenizerTraining, video: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no trainer to log to
        return module.training_step(Batch("clip", Clip(video)), 0)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("l2", lambda error: error.square().mean()),
        ("l1", lambda error: error.abs().mean()),
        ("psnr", lambda error: sum(e.square().mean().log() for e in error) / len(error)),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(kind, value):
    module = training(reconstruction=kind, commitment_weight=0.3, entropy_weight=0.2, reconstruction_weight=2.0)
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    terms, reconstruction, _ = module.losses(video)
    torch.testing.assert_close(terms["reconstruction"], value(reconstruction - video))
    want = 2 * terms["reconstruction"] + 0.3 * terms["commitment"]
    want = want + 0.2 * (terms["sample_entropy"] - terms["batch_entropy"])
    torch.testing.assert_close(loss_of(module, video), want)


def test_entropy_terms_begin_with_a_boost_that_ends(monkeypatch):
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    plain = training(entropy_weight=0.1)
    terms, *_ = plain.losses(video)
    entropy, base = (terms["sample_entropy"] - terms["batch_entropy"]).item(), loss_of(plain, video).item()
    boosted = training(entropy_weight=0.1, entropy_boost=3.0, entropy_steps=100)
    for step, factor in ((0, 3.0), (50, 1.5), (100, 0.0), (900, 0.0)):
        monkeypatch.setattr(TokenizerTraining, "global_step", step)
        assert loss_of(boosted, video).item() == pytest.approx(base + 0.1 * factor * entropy, rel=1e-4)


def test_codes_stay_where_only_the_decoder_learns():
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    for part, stay in (("all", False), ("decoder", True)):
        quantizer = VQ(16, 4)
        module = training(quantizer, part=part)
        quantizer.train()(module.tokenizer.encode_latents(video))  # the first codes
        quantizer.train(part == "all")
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        loss_of(module, video + 0.1)
        after = quantizer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before) == stay


def test_only_the_decoder_learns_where_that_is_asked():
    module = training(part="decoder")
    loss_of(module, torch.rand(1, 3, 5, 32, 32)).backward()
    assert all(p.grad is None for p in module.tokenizer.encoder.parameters())
    assert all(p.grad is not None for p in module.tokenizer.decoder.parameters())


def test_idle_bits_are_found():
    ids, bits = torch.randint(64, (5000,)), (2,) * 6
    assert idle_digits(ids, bits) == []
    assert idle_digits(ids & 0b101101, bits) == [1, 4]
    assert idle_digits(ids | 0b100000, bits) == [5]
    assert idle_digits(torch.zeros(9, dtype=torch.long), (2,) * 3) == [0, 1, 2]


def test_idle_channels_and_codebooks_are_found():
    channels = torch.stack([torch.randint(levels, (5000,)) for levels in (8, 5, 3)])
    assert idle_digits(channels[0] + 8 * channels[1] + 40 * channels[2], (8, 5, 3)) == []
    assert idle_digits(channels[0] + 8 * 2 + 40 * channels[2], (8, 5, 3)) == [1]
    few = torch.tensor([341, 682])[torch.randint(2, (5000,))]  # of which no bit is idle
    assert idle_digits(few, (2,) * 10) == [] and idle_digits(few, (1024,)) == [0]
    assert idle_digits(few + 1024 * torch.randint(1024, (5000,)), (1024, 1024)) == [0]
    assert idle_digits(torch.randint(1024, (30,)), (1024,)) == []  # few tokens take few codes


@pytest.mark.parametrize("quantizer", [LFQ(6), FSQ((8, 5, 3)), VQ(20, 4, levels=2)])
def test_digits_are_those_of_the_ids(quantizer):
    assert math.prod(quantizer.digits) == quantizer.vocabulary
    ids = torch.arange(quantizer.vocabulary).view(1, 1, 1, -1)
    if isinstance(quantizer, VQ):
        assert (ids // quantizer.digits[0]).max() == quantizer.codes - 1
        return
    latents, place = quantizer.lookup(ids)[0, :, 0, 0], 1
    for row, values in zip(latents, quantizer.digits, strict=True):
        digit = ids.flatten() // place % values
        assert len(torch.unique(torch.stack([row, digit.float()]), dim=1).T) == values  # one latent for each digit
        place *= values


def alarms(module: TokenizerTraining, video: torch.Tensor, training: bool = False) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if training:
            module.training_step(Batch("clip", Clip(video)), 0)
        module.eval()
        module.validation_step(Batch("clip", Clip(video)), 1)
        module.on_validation_epoch_end()
    return [str(warning.message) for warning in caught if "clips" in str(warning.message)]


@pytest.mark.parametrize("quantizer", [LFQ, lambda: FSQ((8, 8, 5)), lambda: VQ(64, 8)])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_clips_that_show_nothing_raise_the_alarm(quantizer, spread):
    module = training(quantizer())
    said = alarms(module, 0.3 + spread * torch.randn(2, 3, 5, 32, 32), training=True)
    assert said[0].startswith("100% of the train clips since") and said[1].startswith("100% of the validation clips")
    assert not [text for text in alarms(module, torch.rand(2, 3, 5, 32, 32)) if "one colour" in text]


@pytest.mark.parametrize(
    ("quantizer", "ids", "said"),
    [
        (lambda: LFQ(6, 0.5), 3, r"bits \[0, 1, 2, 3, 4, 5\] of the codes .* raise entropy_weight"),
        (lambda: FSQ((8, 8, 5)), 17, r"digits \[0, 1, 2\] of the codes"),
        (lambda: VQ(64, 8), 17, r"digits \[0\] of the codes"),
    ],
)
def test_a_collapse_raises_the_alarm(quantizer, ids, said):
    module = training(quantizer())
    module._seen = [torch.full((500,), ids)]
    with pytest.warns(UserWarning, match=said):
        module.on_validation_epoch_end()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "l3"}, "l2, l1, psnr; got l3"),
        ({"part": "encoder"}, "all or decoder; got encoder"),
        ({"entropy_steps": 0}, "entropy_steps=0 must be 1 or more"),
    ],
)
def test_unknown_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        training(**options)
