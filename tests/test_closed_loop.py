"""The closed-loop tokenizer: what the encoder shows is what the decoder makes, and nothing looks ahead."""

import pytest
import torch

from reelm.engine import store
from reelm.tokenizers.closed_loop import ClosedLoop, warp
from reelm.tokenizers.quantizers import FSQ, LFQ
from reelm.tokenizers.streaming import decode_stream, encode_stream


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    model = ClosedLoop(FSQ((4, 4, 4)), patch=(4, 4, 4), width=24, encoder_blocks=1, motion_blocks=1, decoder_blocks=1)
    torch.nn.init.normal_(model.to_flow.weight, std=0.3)  # so that something moves
    return model.eval()


def clip(frames: int = 9, size: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_the_decoder_makes_what_the_encoder_saw(tokenizer):
    video = clip()
    shown, ids, _ = tokenizer(video)
    assert torch.equal(tokenizer.encode(video), ids)
    assert torch.equal(tokenizer.decode(ids), shown.clamp(-1, 1))
    assert ids.shape == (2, 3, 4, 4) and shown.shape == video.shape


@torch.no_grad()
def test_tokens_of_a_prefix_are_the_prefix_of_the_tokens(tokenizer):
    video = clip(13)
    ids = tokenizer.encode(video)
    for frames in (1, 5, 9):
        assert torch.equal(tokenizer.encode(video[:, :, :frames]), ids[:, : 1 + frames // 4])
        assert torch.equal(tokenizer.decode(ids)[:, :, :frames], tokenizer.decode(ids[:, : 1 + frames // 4]))


@torch.no_grad()
@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_streams_equal_the_whole(tokenizer, latent_frames):
    video = clip(21)
    ids = tokenizer.encode(video)
    assert torch.equal(torch.cat(list(encode_stream(tokenizer, video.split(3, 2), latent_frames)), 1), ids)
    assert torch.equal(
        torch.cat(list(decode_stream(tokenizer, ids.split(2, 1), latent_frames)), 2), tokenizer.decode(ids)
    )


@torch.no_grad()
def test_what_is_remembered_does_not_grow(tokenizer):
    sizes = []
    past = {}
    for piece in (clip(5), clip(12), clip(8)):
        tokenizer.encode(piece, past)
        sizes.append(sum(t.numel() for t in past.values()))
    assert len(set(sizes)) == 1


def test_every_weight_learns_from_the_last_frame(tokenizer):
    tokenizer.train()
    shown, _, _ = tokenizer(clip(9))
    (shown[:, :, -4:] - clip(9)[:, :, -4:]).square().mean().backward()
    still = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_the_losses_of_the_quantizer_are_means_over_latent_frames():
    torch.manual_seed(0)
    model = ClosedLoop(LFQ(4), patch=(4, 4, 4), width=8, encoder_blocks=1, motion_blocks=1, decoder_blocks=1).train()
    _, _, losses = model(clip(5))
    assert set(losses) == {"sample_entropy", "batch_entropy", "commitment"} and all(
        v.ndim == 0 for v in losses.values()
    )


def test_warp_looks_where_the_flow_leads():
    frame = clip(1, 8)[:, :, 0]
    flow = torch.zeros(2, 2, 8, 8)
    assert torch.allclose(warp(frame, flow), frame, atol=1e-6)
    flow[:, 0] = 2.0
    assert torch.allclose(warp(frame, flow)[..., :-2], frame[..., 2:], atol=1e-5)
    assert torch.allclose(warp(frame, flow)[..., -1], frame[..., -1], atol=1e-5)
    flow[:, 0], flow[:, 1] = 0, -3.0
    assert torch.allclose(warp(frame, flow)[..., 3:, :], frame[..., :-3, :], atol=1e-5)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    store.save(tokenizer, tmp_path)
    again = store.load(tmp_path)
    assert torch.equal(again.encode(clip()), tokenizer.encode(clip()))
    assert store.fingerprint(again) == store.fingerprint(tokenizer)


@torch.no_grad()
def test_the_fingerprint_knows_the_decoder_on_which_the_tokens_depend(tokenizer):
    before = store.fingerprint(tokenizer)
    tokenizer.to_coefficients.bias += 1
    assert store.fingerprint(tokenizer) != before
