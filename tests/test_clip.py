import pytest
import torch

from reelm.data.clip import Clip


def clip(batch: int = 2, frames: int = 3, name: str = "a", audio: bool = True, **changes) -> Clip:
    return Clip(
        torch.rand(batch, 3, frames, 4, 6),
        captions=tuple(f"{name}{i}" for i in range(batch)),
        keys=tuple(f"key {name}{i}" for i in range(batch)),
        audio=torch.rand(batch, 2, 30) if audio else None,
        audio_rate=16_000,
        controls={"depth": torch.rand(batch, 1, frames, 4, 6), "mask": torch.ones(batch, 1, frames, 4, 6).bool()},
    ).replace(**changes)


def test_a_clip_knows_its_shape_and_is_frozen():
    one = clip()
    assert (len(one), one.frames, one.size) == (2, 3, (4, 6))
    with pytest.raises(AttributeError):
        one.fps = 3


def test_wrong_shapes_and_numbers_of_captions_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\); got \(3, 4, 4\)"):
        Clip(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="2 videos but 1 captions"):
        Clip(torch.zeros(2, 3, 1, 4, 4), captions=("one",))
    assert Clip(torch.zeros(2, 3, 1, 4, 4)).captions == ("", "")


@pytest.mark.parametrize("index", [0, 1, -1, slice(1, 3)])
def test_indexing_takes_everything_of_a_sample(index):
    whole = clip(3)
    part = whole[index]
    rows = list(range(3))[index]
    rows = rows if isinstance(rows, list) else [rows]
    assert torch.equal(part.video, whole.video[rows]) and torch.equal(part.audio, whole.audio[rows])
    assert torch.equal(part.controls["depth"], whole.controls["depth"][rows])
    assert part.captions == tuple(whole.captions[i] for i in rows) and part.keys == tuple(whole.keys[i] for i in rows)


def test_tokens_stay_with_their_clips_and_need_no_pixels():
    whole = clip(3, tokens=torch.arange(24).view(3, 2, 2, 2), video=torch.empty(3, 3, 5, 4, 6, device="meta"))
    assert torch.equal(whole[1:].tokens, whole.tokens[1:])
    assert torch.equal(Clip.stack([whole[i] for i in range(3)]).tokens, whole.tokens)
    assert Clip.stack([whole, whole.replace(tokens=None)]).tokens is None
    moved = whole.to("cpu", torch.float16)
    assert moved.video.is_meta and moved.tokens.dtype == torch.int64 and moved.device.type == "cpu"
    with pytest.raises(ValueError, match=r"2 videos have tokens \(B, t, h, w\[, D\]\); got \(3, 2, 2, 2\)"):
        clip(2, tokens=whole.tokens)


def test_stacking_undoes_indexing():
    whole = clip(3)
    again = Clip.stack([whole[i] for i in range(3)])
    assert torch.equal(again.video, whole.video) and torch.equal(again.audio, whole.audio)
    assert again.captions == whole.captions and again.keys == whole.keys
    assert all(torch.equal(again.controls[name], whole.controls[name]) for name in whole.controls)


def test_clips_that_differ_are_named_and_refused():
    with pytest.raises(ValueError, match="key a0 .* key b0") as error:
        Clip.stack([clip(), clip(frames=5, name="b")])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="differ"):
        Clip.stack([clip(), clip(fps=9.0)])
    assert Clip.stack([clip(), clip(audio=False)]).audio is None


def test_a_dtype_leaves_masks_alone():
    moved = clip().to(torch.float16)
    assert moved.video.dtype == moved.audio.dtype == moved.controls["depth"].dtype == torch.float16
    assert moved.controls["mask"].dtype == torch.bool
    moved = clip().to("meta", non_blocking=True)
    assert moved.video.is_meta and moved.controls["mask"].is_meta and moved.captions == ("a0", "a1")
