"""Tokenizers without quantization: what their tokens are, and that all programs take them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from reelm.data.clip import Clip
from reelm.data.tokens import Shard, TokenShards, write_shard
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import store
from reelm.engine.comparison import compare, table
from reelm.engine.encoding import Encoding, encode
from reelm.engine.optimisation import Optimisation
from reelm.engine.tokenizer_training import TokenizerTraining
from reelm.lm.vocabulary import Vocabulary
from reelm.tokenizers.closed_loop import ClosedLoop
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ, Continuous
from reelm.tokenizers.streaming import decode_stream, encode_stream
from reelm.tokenizers.tokenizer import VideoTokenizer, in_half_precision
from reelm.tokenizers.vivit import ViViT

SCALE, SHIFT = torch.tensor([0.1, 1.0, 30.0]).view(-1, 1, 1, 1), torch.tensor([5.0, 0.0, -100.0]).view(-1, 1, 1, 1)


def magvit2(quantizer: nn.Module) -> MAGVIT2:
    torch.manual_seed(0)
    kernels = ((1, 3, 3), (3, 3, 3))
    return MAGVIT2(quantizer, (8, 8), ((1, 2, 2),), (1, 1), kernels, (4, 4, 4))


def make(name: str) -> VideoTokenizer:
    """A tokenizer whose running statistics have followed some clips."""
    quantizer = Continuous(4, gaussian=name == "gaussian")
    if name == "vivit":
        tokenizer = ViViT(quantizer, (2, 8, 8), 32, 2, "st", window=2)
    else:
        tokenizer = ClosedLoop(quantizer, width=16) if name == "closed loop" else magvit2(quantizer)
    tokenizer.train()
    for _ in range(3):
        tokenizer(noise(5, clips=2))
    return tokenizer.eval()


def noise(frames: int, clips: int = 1) -> torch.Tensor:
    return torch.rand(clips, 3, frames, 32, 32) * 2 - 1


@pytest.fixture(scope="module", params=["plain", "gaussian", "vivit", "closed loop"])
def tokenizer(request) -> VideoTokenizer:
    return make(request.param)


def test_tokens_have_unit_variance_and_lookup_undoes_it():
    quantizer = Continuous(3)
    for _ in range(50):
        quantizer(torch.randn(2, 3, 2, 8, 8) * SCALE + SHIFT)
    z = torch.randn(4, 3, 2, 16, 16) * SCALE + SHIFT
    quantized, tokens, losses = quantizer.eval()(z)
    assert tokens.shape == (4, 2, 16, 16, 3) and tokens.dtype == torch.float32 and not losses
    assert torch.equal(quantized, z)
    torch.testing.assert_close(tokens.flatten(0, 3).std(0), torch.ones(3), atol=0.05, rtol=0)
    torch.testing.assert_close(tokens.flatten(0, 3).mean(0), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(quantizer.lookup(tokens), z)


def test_running_statistics_are_those_of_all_that_was_seen():
    quantizer = Continuous(3)
    batches = [torch.randn(2, 3, 1, 4, 4) * SCALE + SHIFT * i for i in range(20)]
    for batch in batches:
        quantizer(batch)
    every = torch.cat(batches).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(quantizer.mean, every.mean(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(quantizer.variance, every.var(0, correction=0), atol=1e-4, rtol=1e-4)
    before = quantizer.mean.clone()
    quantizer.eval()(batches[0])
    assert torch.equal(quantizer.mean, before)


def test_old_statistics_are_forgotten():
    quantizer = Continuous(1)
    for shift in (0.0, 7.0):
        for _ in range(600):
            quantizer(torch.full((1, 1, 1, 1, 1), shift))
    assert quantizer.mean.item() == pytest.approx(7, abs=0.1) and quantizer.variance.item() < 1


def test_a_channel_that_never_moves_stays_finite():
    quantizer = Continuous(2)
    z = torch.full((1, 2, 1, 2, 2), 3.0)
    tokens = [quantizer(z)[1] for _ in range(3)][-1]
    assert tokens.isfinite().all() and torch.equal(quantizer.lookup(tokens), z)


def test_the_posterior_is_drawn_from_in_training_and_its_mean_encoded():
    quantizer = Continuous(3, gaussian=True)
    z = torch.randn(2, 6, 2, 3, 3, requires_grad=True)
    mean, log_variance = z.chunk(2, 1)
    first, tokens, losses = quantizer(z)
    second = quantizer(z)[0]
    posterior = Normal(mean, (log_variance / 2).exp())
    torch.testing.assert_close(losses["kl"], kl_divergence(posterior, Normal(0.0, 1.0)).mean())
    assert first.shape == mean.shape and not torch.equal(first, second)
    many = torch.stack([quantizer(z)[0].detach() for _ in range(500)])
    torch.testing.assert_close(many.mean(0), mean.detach(), atol=0.5, rtol=0)
    torch.testing.assert_close(many.std(0), posterior.stddev.detach(), atol=0.3, rtol=0.1)
    losses["kl"].backward()
    assert (z.grad != 0).all() and not tokens.requires_grad
    drawn, tokens, losses = quantizer.eval()(z)
    assert torch.equal(drawn, mean) and not losses
    torch.testing.assert_close(quantizer.lookup(tokens), mean.detach())


def test_wild_posteriors_stay_finite():
    z = torch.tensor([1.0, 1e4]).view(1, 2, 1, 1, 1).requires_grad_()
    quantized, _, losses = Continuous(1, gaussian=True)(z)
    (quantized.sum() + losses["kl"]).backward()
    assert losses["kl"].isfinite() and z.grad.isfinite().all()


def test_it_is_a_tokenizer_as_others_are(tokenizer):
    video = noise(9)
    tokens = tokenizer.encode(video)
    assert tokenizer.vocabulary is None and tokens.dtype == torch.float32
    assert tokens.shape == (1, *tokenizer.grid(9, 32, 32), 4)
    latents = tokenizer.encode_latents(video)[:, :4]
    torch.testing.assert_close(tokenizer.quantizer.lookup(tokens), latents)
    straight = tokenizer.decode_latents(latents).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), straight, atol=1e-5, rtol=0)
    reconstruction, again, losses = tokenizer(video)
    torch.testing.assert_close(again, tokens)  # gradients take other kernels
    assert reconstruction.shape == video.shape and not losses
    step = tokenizer.compression[0]
    prefix = tokenizer.encode(video[:, :, : 1 + step])
    torch.testing.assert_close(prefix, tokens[:, :2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_a_stream_equals_the_whole_clip(tokenizer, pieces):
    video = noise(1 + 4 * tokenizer.compression[0])
    tokens = tokenizer.encode(video)
    pixels = tokenizer.decode(tokens)
    made = torch.cat(list(encode_stream(tokenizer, video.split(pieces, 2), 2)), 1)
    assert torch.equal(made, tokens)
    assert torch.equal(torch.cat(list(decode_stream(tokenizer, tokens.split(pieces, 1), 2)), 2), pixels)


def test_statistics_are_stored_and_part_of_what_tells_tokenizers_apart(tokenizer, tmp_path):
    store.save(tokenizer, tmp_path / "a", "int8")
    loaded = store.load(tmp_path / "a")
    assert torch.equal(loaded.quantizer.mean, tokenizer.quantizer.mean)
    assert torch.equal(loaded.quantizer.variance, tokenizer.quantizer.variance)
    before = store.fingerprint(loaded)
    if "decoder" in getattr(loaded, "decoding_only", ()):
        for weight in loaded.decoder.parameters():
            weight.data.zero_()
        assert store.fingerprint(loaded) == before
    loaded.quantizer.variance *= 2
    assert store.fingerprint(loaded) != before


def test_a_discrete_tokenizer_can_be_what_training_begins_with(tmp_path):
    store.save(magvit2(LFQ(4)).eval(), tmp_path)
    begun = magvit2(Continuous(4)).eval()
    store.grow(begun, tmp_path, "tokenizer")
    video = noise(5)
    assert torch.equal(begun.encode_latents(video), store.load(tmp_path).encode_latents(video))


def test_the_divergence_has_its_weight():
    module = TokenizerTraining(magvit2(Continuous(4, gaussian=True)), Optimisation(), kl_weight=0.3)
    terms, _, tokens = module.losses(noise(5))
    assert set(terms) == {"kl", "reconstruction"} and module.weights["kl"] == 0.3 and tokens.ndim == 5


def test_latents_are_compared_at_16_bits_a_number():
    tokenizer, clip = make("plain"), Clip(noise(5))
    results = compare(clip, tokenizer, (), None, print)
    figures = results[0].figures
    assert figures["tokens"] == 2 * 4 * 4 and figures["numbers_per_token"] == 4
    assert figures["bits"] == 16 * 4 * figures["tokens"] and "codes_used" not in figures
    rounded = tokenizer.decode(tokenizer.encode(clip.video).half())
    torch.testing.assert_close(results[0].video, rounded, atol=1e-6, rtol=0)
    assert "32 latents of 4 numbers, 16 bits each" in table(results)
    with pytest.raises(ValueError, match="do not fit 16 bits"):
        in_half_precision(torch.tensor([1e6]))


def test_shards_hold_latents(tmp_path):
    tokenizer, source = make("plain"), Zoetrope(frames=5, size=32, length=5)
    encode([Encoding(source, tokenizer, tmp_path / "train", {}, shard_clips=3, batch_size=2)], workers=0)
    stored = TokenShards(tmp_path)
    assert len(stored) == 5 and stored.vocabulary is None
    for index in range(5):
        tokens = tokenizer.encode(source.get(index).video)
        assert stored[index].tokens.dtype == torch.float32 and stored[index].tokens.shape == (1, 2, 4, 4, 4)
        torch.testing.assert_close(stored[index].tokens, tokens, atol=1e-2, rtol=1e-3)
    first = stored.get(0, frames=1)
    assert torch.equal(first.tokens, stored[0].tokens[:, :1]) and len(Clip.stack([stored[0], stored[1]]).tokens) == 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    (tmp_path / "train/000001.safetensors").unlink()
    encode([Encoding(source, tokenizer, tmp_path / "train", {}, shard_clips=3, batch_size=2)], workers=0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()} == before


def test_latents_that_are_none_are_refused(tmp_path):
    for values in (np.full((1, 1, 1, 1, 2), np.inf, np.float16), np.zeros((1, 1, 1, 1), np.uint8)):
        write_shard(tmp_path / "x.safetensors", values, [""], ["a"], {})
        with pytest.raises(ValueError, match="damaged"):
            Shard(tmp_path / "x.safetensors").tokens(0, 1, None)
    write_shard(tmp_path / "y.safetensors", np.zeros((1, 1, 1, 1, 2), np.float16), [""], ["a"], {})
    with pytest.raises(ValueError, match="damaged"):
        Shard(tmp_path / "y.safetensors").tokens(0, 1, 16)


def test_no_head_predicts_them():
    with pytest.raises(ValueError, match="tokens are continuous: take head=per_token_diffusion"):
        Vocabulary(visual=make("plain").vocabulary, text=8)
