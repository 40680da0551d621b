"""Large frames in tiles and frames of any size: what comes out is what the whole frame gives."""

import pytest
import torch
from torch.nn import functional as F

from reelm.evaluation.reconstruction import psnr
from reelm.tokenizers.closed_loop import ClosedLoop
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.memory import PeakMemory, bytes_of, bytes_per_pixel
from reelm.tokenizers.quantizers import LFQ, VQ, Continuous
from reelm.tokenizers.streaming import decode_stream, encode_stream
from reelm.tokenizers.tiling import Tiled, Tiles, padded
from reelm.tokenizers.vivit import ViViT


def make(norm: str = "site") -> MAGVIT2:
    torch.manual_seed(0)
    return MAGVIT2(
        LFQ(8), patch=(4, 4, 4), channels=(16, 16), strides=((1, 2, 2),), blocks=(1, 1), encoder_norm=norm,
        kernels=((1, 3, 3), (3, 3, 3)), decoder_norm=norm,
    ).eval()  # fmt: skip


def waves(frames: int = 9, height: int = 160, width: int = 192) -> torch.Tensor:
    return F.interpolate(torch.rand(1, 3, 3, 12, 16) * 2 - 1, size=(frames, height, width), mode="trilinear")


@pytest.fixture(scope="module")
def site() -> tuple[MAGVIT2, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokenizer = make()
    torch.manual_seed(1)
    video = waves()
    ids = tokenizer.encode(video)
    return tokenizer, video, ids, tokenizer.decode(ids)


def test_reach_is_what_a_change_reaches():
    tokenizer = make()
    assert tokenizer.reach() == ((4, 4), (6, 6)) == Tiled(tokenizer).reach()
    video = torch.zeros(1, 3, 1, 128, 128)
    video[..., 64, 64] = 100
    with torch.no_grad():
        for before, stretch, reach, run in (
            (torch.zeros(1, 3, 1, 128, 128), 8, 4, tokenizer.encode_latents),
            (torch.zeros(1, 8, 1, 16, 16), 1, 6, tokenizer.decode_latents),
        ):
            after = before.clone()
            after[..., 8 * stretch, 8 * stretch] = 100
            change = (run(after) != run(before)).any(1)[0, 0].nonzero()
            per_latent = 1 if stretch == 8 else 8
            far = max(8 * per_latent - int(change.min()), int(change.max()) + 1 - 9 * per_latent)
            assert (reach - 2) * per_latent <= far <= reach * per_latent
    assert ViViT(LFQ(4), width=32, heads=2).reach() is None


def test_tiles_cover_and_weights_add_up():
    for length, most, overlap in ((20, 16, 8), (40, 11, 5), (7, 8, 4), (33, 8, 7), (100, 10, 0)):
        tiles = Tiles.over((length, 4), (most, 4), (overlap, 0))
        starts, size = tiles.starts[0], tiles.size[0]
        assert starts[0] == 0 and starts[-1] + size == length and size <= max(most, 1)
        assert all(a + size - b >= overlap for a, b in zip(starts, starts[1:]))
        own = [tiles.own(0, start) for start in starts]
        assert own[0][0] == 0 and own[-1][1] == length and all(a[1] == b[0] for a, b in zip(own, own[1:]))
        total = torch.zeros(8 * length)
        for start in starts:
            weights = tiles.weights(0, start, 8)
            assert len(weights) == 8 * size and weights.min() >= 0
            total[8 * start : 8 * (start + size)] += weights
        torch.testing.assert_close(total, torch.ones(8 * length))


def test_tiles_of_a_net_that_sees_no_whole_frame_leave_no_seams(site):
    tokenizer, video, ids, pixels = site
    tiled = Tiled(tokenizer, tile=(128, 128))
    assert torch.equal(tiled.encode(video), ids) and tiled.used == 4
    made = tiled.decode(ids)
    assert made.shape == pixels.shape and psnr(made, pixels) >= 45


def test_norms_over_frames_make_a_difference_that_wide_tiles_make_small():
    tokenizer, video = make("frame"), waves(5)
    ids = tokenizer.encode(video)
    pixels = tokenizer.decode(ids)
    near, nearer = (psnr(Tiled(tokenizer, (side, side)).decode(ids), pixels) for side in (64, 128))
    assert 20 < near < nearer


def test_one_tile_is_the_tokenizer_itself(site):
    tokenizer, video, ids, pixels = site
    for tiled in (Tiled(tokenizer), Tiled(tokenizer, memory="2GB"), Tiled(tokenizer, (160, 192), latent_frames=2)):
        assert torch.equal(tiled.encode(video), ids) and torch.equal(tiled.decode(ids), pixels) and tiled.used == 1


@pytest.mark.parametrize("pieces", [1, 5])
def test_streams_of_tiles_are_the_tiles_of_the_whole(site, pieces):
    tokenizer, video, ids, _ = site
    tiled = Tiled(tokenizer, tile=(128, 96))
    assert torch.equal(torch.cat(list(encode_stream(tiled, video.split(pieces, 2), 1)), 1), tiled.encode(video))
    assert torch.equal(torch.cat(list(decode_stream(tiled, ids.split(1, 1), 1)), 2), tiled.decode(ids))


def test_tokenizers_of_whole_clips_get_them(site, monkeypatch):
    tokenizer, video, ids, _ = site
    encode, lengths = tokenizer.encode_latents, []
    monkeypatch.setattr(tokenizer, "streams", False)
    monkeypatch.setattr(
        tokenizer, "encode_latents", lambda x, past=None: (lengths.append(x.shape[2]), encode(x, past))[1]
    )
    tiled = Tiled(tokenizer, (128, 128), latent_frames=1)
    assert torch.equal(tiled.encode(video), ids) and lengths == [9] * 4 and not tiled.streams


def test_any_tokenizer_can_be_tiled():
    for tokenizer in (
        ClosedLoop(VQ(16, 4), width=16, encoder_blocks=1, motion_blocks=1, decoder_blocks=1).eval(),
        MAGVIT2(Continuous(4), (8,), (), (1,), ((3, 3, 3),), (4, 4, 4)).eval(),
        ViViT(LFQ(4), (2, 8, 8), 32, 2, "st").eval(),
    ):
        frames = 1 + 2 * tokenizer.compression[0]
        tiled, video = Tiled(tokenizer, memory="2MB", latent_frames=1), waves(frames, 96, 128)
        tokens = tiled.encode(video)
        assert tokens.shape == tokenizer.encode(video).shape and tiled.used > 1
        assert tiled.decode(tokens).shape == video.shape


def test_a_budget_chooses_the_tiles(site):
    tokenizer, video, ids, _ = site
    pixel = bytes_per_pixel(tokenizer, 17)
    tiled = Tiled(tokenizer, memory=int(160 * 192 * pixel / 2))
    tiled.encode(video)
    rows, columns = tiled._chosen[1, 20, 24]
    assert 1 < tiled.used < 9 and 160 * 192 / 4 < 64 * rows * columns <= 160 * 192 / 2
    with PeakMemory([*tokenizer.parameters(), *tokenizer.buffers()]) as peak:
        tokenizer.decode_latents(tokenizer.quantizer.lookup(ids[:, :, :rows, :columns]))
    assert peak.most <= 64 * rows * columns * pixel
    with pytest.raises(ValueError, match="memory=20KB is too little: 17 frames of 16 x 16 alone take"):
        Tiled(tokenizer, memory="20KB").encode(video)


def test_tensors_are_counted_while_they_live():
    with PeakMemory() as peak:
        kept = torch.zeros(1000, device="meta")
        for _ in range(3):
            kept = kept + 1  # two at a time
    assert peak.most == 8000 and peak.now == 4000
    with PeakMemory([kept]) as peak:
        kept.view(10, 100).T.add_(1)
    assert peak.most == 0


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), (4096, 4096), ("7", 7)]
)
def test_amounts_of_memory(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "2TBs", "1e9"])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match=f"memory={text} is no amount of memory"):
        bytes_of(text)


def test_when_memory_runs_out_tiles_become_smaller(site, monkeypatch):
    tokenizer, video, ids, pixels = site

    def short_of_memory(run):
        def work(x, past=None):
            if x.shape[3] * x.shape[4] > limit * (1 if x.shape[1] == 8 else 64):
                raise torch.OutOfMemoryError
            return run(x, past)

        return work

    for name in ("encode_latents", "decode_latents"):
        monkeypatch.setattr(tokenizer, name, short_of_memory(getattr(tokenizer, name)))
    limit = 300
    tiled = Tiled(tokenizer)
    assert torch.equal(tiled.encode(video), ids) and tiled.used > 1
    assert psnr(tiled.decode(ids), pixels) >= 45
    tiled = Tiled(tokenizer)
    assert torch.equal(torch.cat(list(encode_stream(tiled, video.split(5, 2), 1)), 1), ids)
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        Tiled(tokenizer).encode(video)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 32, 40), (2, 33, 47), (9, 40, 41), (12, 7, 64)])
def test_any_size_comes_back_as_it_was(shape):
    tokenizer, video = make(), waves(*shape)
    frames, height, width = shape
    whole = padded(video, tokenizer.compression)
    assert torch.equal(whole[:, :, :frames, :height, :width], video)
    assert all(new - old < 8 for new, old in zip(whole.shape, video.shape))
    assert torch.equal(whole[:, :, -1], whole[:, :, frames - 1])
    assert (whole[..., height - 1 :, :] == whole[..., height - 1 : height, :]).all()
    assert tokenizer.decode(tokenizer.encode(whole))[:, :, :frames, :height, :width].shape == video.shape


def test_mistakes_are_named():
    for options in ({"tile": (0, 4)}, {"tile": (4, 4, 4)}, {"overlap": -1}, {"latent_frames": 0}):
        with pytest.raises(ValueError, match="are no sizes"):
            Tiled(make(), **options)
    with pytest.raises(ValueError, match="adaptive=true has norms of whole frames; decoder_norm=site"):
        MAGVIT2(LFQ(4), adaptive=True, decoder_norm="site")
    with pytest.raises(ValueError, match="decoder_norm is one of frame, site; got batch"):
        MAGVIT2(LFQ(4), decoder_norm="batch")
