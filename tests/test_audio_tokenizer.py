"""The tokenizer of sound: what it sees, what it remembers, what it makes of any sound."""

import pytest
import torch

from reelm.engine import store
from reelm.tokenizers.audio import CausalConv1d, SoundStream, UpConv1d
from reelm.tokenizers.quantizers import ResidualVQ
from reelm.tokenizers.spectral import SpectralLoss
from reelm.tokenizers.streaming import decode_stream, encode_stream

VARIANTS = {
    "paper": {"widths": (4, 8, 8, 16), "strides": (2, 4, 5)},
    "patch": {"widths": (8, 12, 16), "strides": (5, 2), "patch": 4, "encoder_dilations": (1,)},
    "mono, snake": {"widths": (6, 8), "strides": (8,), "channels": 1, "activation": "snake"},
}


def make(variant: str = "patch", **changes) -> SoundStream:
    torch.manual_seed(1)
    model = SoundStream(ResidualVQ(32, 6, 3), **(VARIANTS[variant] | changes))
    model(noise(40 * model.compression))  # the first codes
    return model.eval()


def noise(samples: int, batch: int = 1, channels: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, samples) * 2 - 1


@pytest.fixture(params=VARIANTS, scope="module")
def whole(request) -> tuple[SoundStream, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokenizer = make(request.param)
    sound = noise(33 * tokenizer.compression)
    ids = tokenizer.encode(sound)
    return tokenizer, sound, ids, tokenizer.decode(ids)


def test_shapes_and_ranges(whole):
    tokenizer, sound, ids, made = whole
    assert ids.shape == (1, 33, 3) and ids.dtype == torch.int64 and tokenizer.levels == 3
    assert 0 <= ids.min() and ids.max() < tokenizer.vocabulary == 32
    assert made.shape == (1, tokenizer.channels, sound.shape[2]) and made.abs().max() <= 1


@pytest.mark.parametrize("latents", [1, 2, 32])
def test_the_ids_of_a_prefix_are_the_prefix_of_the_ids(whole, latents):
    tokenizer, sound, ids, made = whole
    part = sound[:, :, : latents * tokenizer.compression]
    assert torch.equal(tokenizer.encode(part), ids[:, :latents])
    assert torch.equal(tokenizer.decode(ids[:, :latents]), made[:, :, : part.shape[2]])


def test_no_latent_sees_a_later_sample_and_each_sees_its_last(whole):
    tokenizer, sound, _, _ = whole
    sound, c = sound.clone().requires_grad_(), tokenizer.compression
    slope = torch.autograd.grad(tokenizer.encode_latents(sound)[:, :, 5].sum(), sound)[0].abs().amax((0, 1))
    assert slope[6 * c :].max() == 0 and slope[6 * c - 1] > 0


@pytest.mark.parametrize("pieces", [1, 50, 1001])
@pytest.mark.parametrize("latents", [1, 2, 7])
def test_a_stream_equals_the_whole(whole, pieces, latents):
    tokenizer, sound, ids, made = whole
    assert torch.equal(torch.cat(list(encode_stream(tokenizer, sound.split(pieces, 2), latents)), 1), ids)
    assert torch.equal(torch.cat(list(decode_stream(tokenizer, ids.split(pieces, 1), latents)), 2), made)
    past, whole_latents = {}, tokenizer.encode_latents(sound)
    for number, piece in enumerate(sound.split(latents * tokenizer.compression, 2)):
        part = tokenizer.encode_latents(piece, past)
        assert torch.equal(part, whole_latents[:, :, number * latents :][:, :, : part.shape[2]])


def test_batches_stream_too():
    tokenizer = make()
    sound = noise(20 * tokenizer.compression, 3)
    parts = list(encode_stream(tokenizer, sound.split(77, 2), 3))
    assert torch.equal(torch.cat(parts, 1), tokenizer.encode(sound))


def test_what_is_remembered_does_not_grow(whole):
    tokenizer, sound, _, _ = whole
    encoded, decoded, sizes = {}, {}, []
    for piece in sound.split([5 * tokenizer.compression] + [2 * tokenizer.compression] * 14, 2):
        tokenizer.decode(tokenizer.encode(piece, encoded), decoded)
        sizes.append(sum(t.untyped_storage().nbytes() for past in (encoded, decoded) for t in past.values()))
    assert len(set(sizes)) == 1 and sizes[0] > 0


@pytest.mark.parametrize("samples", [1, 19, 20, 21, 333])
def test_any_length_is_filled_up_with_silence(samples):
    tokenizer = make(strides=(5, 1))
    sound = noise(samples)
    missing = -samples % 20
    ids = tokenizer.encode(sound)
    assert ids.shape[1] == (samples + missing) // 20
    assert torch.equal(ids, tokenizer.encode(torch.nn.functional.pad(sound, (0, missing))))
    assert torch.equal(torch.cat(list(encode_stream(tokenizer, sound.split(7, 2), 2)), 1), ids)
    assert tokenizer(sound)[0].shape == sound.shape


def test_a_stream_cannot_go_on_after_its_last_piece():
    tokenizer, past = make(), {}
    tokenizer.encode(noise(45), past)
    with pytest.raises(ValueError, match="ends with the piece that is no multiple of 40 samples"):
        tokenizer.encode(noise(40), past)


def test_mono_and_stereo_come_to_what_the_tokenizer_takes():
    stereo, mono = make(), make("mono, snake")
    one, two = noise(80, channels=1), noise(80)
    assert torch.equal(stereo.encode(one), stereo.encode(torch.cat([one, one], 1)))
    assert torch.equal(mono.encode(two), mono.encode(two.mean(1, keepdim=True)))
    assert mono.decode(mono.encode(two)).shape == (1, 1, 80)


def test_left_and_right_are_told_apart():
    tokenizer, sound = make(), noise(400)
    assert not torch.equal(tokenizer.encode(sound), tokenizer.encode(sound.flip(1)))
    left, right = tokenizer.decode(tokenizer.encode(sound))[0]
    assert not torch.equal(left, right)


def test_up_sampling_is_the_transposed_convolution_of_the_paper():
    up = UpConv1d(3, 5, 4)
    x = torch.randn(2, 3, 9)
    # the tap of the place itself makes the first `stride` samples of the kernel, that of the place before the others
    taps = up.conv.weight.view(5, 4, 3, 2)
    kernel = torch.cat([taps[..., 1], taps[..., 0]], 1).permute(2, 0, 1)
    want = torch.nn.functional.conv_transpose1d(x, kernel, stride=4)[:, :, :36]
    torch.testing.assert_close(up(x), want + up.conv.bias.view(5, 4).repeat(1, 9), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride, dilation, kernel", [(1, 1, 7), (1, 9, 7), (4, 1, 8), (5, 1, 10), (1, 1, 1)])
def test_causal_convolutions_see_the_end_of_their_stride_last(stride, dilation, kernel):
    conv = CausalConv1d(2, 3, kernel, stride, dilation)
    x = torch.randn(2, 2, 40, requires_grad=True)
    made = conv(x)
    assert made.shape[2] == 40 // stride
    slope = torch.autograd.grad(made[:, :, 2].sum(), x)[0].abs().amax((0, 1))
    assert slope.nonzero().max() == 3 * stride - 1


def test_the_size_of_the_paper_s_network():
    """Latents of 320 samples, and the shapes of transformers' DAC with the same strides."""
    from transformers import DacConfig, DacModel

    with torch.device("meta"):
        ours = SoundStream(ResidualVQ(1024, 512, 4), channels=1)
        theirs = DacModel(DacConfig(encoder_hidden_size=32, downsampling_ratios=[2, 4, 5, 8], n_codebooks=4))
    assert ours.compression == 320 == theirs.config.hop_length
    sound = torch.zeros(1, 1, 320 * 5, device="meta")
    assert ours.encode_latents(sound).shape == theirs.encoder(sound).shape == (1, 512, 5)
    assert 8e6 < sum(p.numel() for p in ours.parameters()) < 18e6


def test_a_folder_keeps_it(tmp_path):
    tokenizer, sound = make(), noise(400)
    store.save(tokenizer, tmp_path)
    loaded = store.load(tmp_path)
    assert isinstance(loaded, SoundStream) and (loaded.rate, loaded.patch) == (16_000, 4)
    assert torch.equal(loaded.encode(sound), tokenizer.encode(sound))
    assert store.fingerprint(loaded) == store.fingerprint(tokenizer)
    with torch.no_grad():
        next(loaded.decoder.parameters()).add_(1)
    assert store.fingerprint(loaded) == store.fingerprint(tokenizer)


def test_a_deeper_one_begins_as_the_smaller_one(tmp_path):
    small, sound = make(dilations=(1,)), noise(400)
    store.save(small, tmp_path)
    large = make(dilations=(1, 3), encoder_dilations=(1, 3))
    store.grow(large, tmp_path, "audio")
    torch.testing.assert_close(large(sound)[0], small(sound)[0])
    with pytest.raises(ValueError, match="patch=4, which cannot grow to 2"):
        store.grow(make(patch=2), tmp_path, "audio")


def test_the_spectral_loss_hears_pitch_and_loudness_but_hardly_phase():
    clock = torch.arange(8000) / 8000

    def tone(pitch: float, loud: float = 0.3, phase: float = 0.0) -> torch.Tensor:
        return (loud * torch.sin(2 * torch.pi * pitch * clock + phase)).expand(1, 2, -1)

    loss, true = SpectralLoss(8000, (256, 1024)), tone(440)
    assert loss(true, true) < 1e-4
    shifted, louder, other = (loss(made, true) for made in (tone(440, phase=1.5), tone(440, 0.6), tone(660)))
    assert shifted < 0.5 * louder and louder < other
    made = tone(440, 0.2).clone().requires_grad_()
    loss(made, true).backward()
    assert made.grad.isfinite().all() and made.grad.abs().max() > 0
    silent = torch.zeros_like(true, requires_grad=True)
    loss(silent, true).backward()
    assert silent.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (2, 2, 2)}, "3 widths ask for 2 strides; got 3"),
        ({"channels": 3}, "mono or stereo; channels=3"),
        ({"activation": "relu"}, "elu or snake; got relu"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("shape", [(1, 3, 100), (1, 2, 0), (2, 100)])
def test_what_is_no_sound_is_named(shape):
    with pytest.raises(ValueError, match="a sound is .B, 1 or 2 channels, samples.; got"):
        make().encode(torch.zeros(shape))
