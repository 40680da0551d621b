"""Decoding goes on in smaller parts where memory runs out."""

import warnings

import pytest
import torch

from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.memory import out_of_memory
from reelm.tokenizers.quantizers import LFQ, ResidualVQ
from reelm.tokenizers.within_memory import decode_within_memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


def short_of_memory(tokenizer, limit: int, error: Exception) -> list[int]:
    """Lets a tokenizer decode so many latents at once; the list of how many it was asked for grows."""
    real, asked = tokenizer.decode_latents, []

    def decode_latents(latents, past=None):
        asked.append(latents[:, 0].numel())
        if asked[-1] > limit:
            raise error
        return real(latents, past)

    tokenizer.decode_latents = decode_latents
    return asked


def video() -> MAGVIT2:
    torch.manual_seed(0)
    return MAGVIT2(
        LFQ(6), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    ).eval()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("limit", [3 * 24, 24])
def test_samples_and_pieces_in_time_change_nothing(limit, error):
    tokenizer, tokens = video(), torch.randint(0, 64, (2, 3, 4, 6))
    whole = tokenizer.decode(tokens)
    asked = short_of_memory(tokenizer, limit, error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(decode_within_memory(tokenizer, tokens), whole, rtol=0, atol=1e-6)
    assert asked[0] == 2 * 3 * 24 and min(asked) == limit


def test_tiles_come_last_and_with_a_warning():
    tokenizer, tokens = video(), torch.randint(0, 64, (1, 3, 4, 6))
    whole = tokenizer.decode(tokens)
    short_of_memory(tokenizer, 12, ERRORS[1])
    with pytest.warns(UserWarning, match=r"memory ran out: decoded in \d+ tiles, whose seams may show"):
        made = decode_within_memory(tokenizer, tokens)
    assert made.shape == whole.shape and made.isfinite().all()


def test_what_cannot_be_is_one_line():
    tokenizer, tokens = video(), torch.randint(0, 64, (2, 3, 4, 6))
    short_of_memory(tokenizer, 0, ERRORS[1])
    with pytest.raises(MemoryError, match="in decoding 3 x 4 x 6 tokens, in the smallest parts too; free") as caught:
        decode_within_memory(tokenizer, tokens)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [9, 2])
def test_sound_goes_on_in_pieces(limit):
    torch.manual_seed(0)
    tokenizer = SoundStream(ResidualVQ(8, 4, 2), widths=[8, 8], strides=[5], patch=200, dilations=[1]).eval()
    tokens = torch.randint(0, 8, (2, 18, 2))
    whole = tokenizer.decode(tokens)
    asked = short_of_memory(tokenizer, limit, ERRORS[0])
    assert torch.equal(decode_within_memory(tokenizer, tokens), whole) and max(asked[-2:]) <= limit
    short_of_memory(tokenizer, 0, ERRORS[0])
    with pytest.raises(MemoryError, match="in decoding 18 x 2 tokens"):
        decode_within_memory(tokenizer, tokens)


def test_other_errors_are_not_hidden():
    tokenizer = video()
    short_of_memory(tokenizer, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        decode_within_memory(tokenizer, torch.zeros(1, 1, 4, 4, dtype=torch.long))
    assert not out_of_memory(ValueError("allocate memory"))
