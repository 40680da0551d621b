"""Streams give what whole clips give, to the last bit, and remember no more the longer they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reelm.tokenizers.magvit2 import MAGVIT2, AdaptiveNorm
from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.streaming import decode_stream, encode_stream
from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.vivit import ViViT

SPATIAL, TEMPORAL = (1, 2, 2), (2, 2, 2)
VARIANTS = {
    "patch": {"patch": (4, 4, 4), "channels": (8, 8), "strides": (SPATIAL,)},
    "late": {"channels": (8, 8, 16), "strides": (SPATIAL, TEMPORAL), "adaptive": True},
    "patch and stride": {"patch": (2, 2, 2), "channels": (8, 8), "strides": (TEMPORAL,), "adaptive": True},
    "8 x 4 x 4": {"patch": (2, 1, 1), "channels": (8, 8, 8), "strides": (TEMPORAL, (2, 2, 2))},
}


TRANSFORMERS = {"c-vivit": ((2, 8, 8), "sstt", 3), "st-vivit": ((1, 4, 4), "stst", 2)}


def make(variant: str = "patch") -> VideoTokenizer:
    torch.manual_seed(1)
    if variant in TRANSFORMERS:
        patch, layers, window = TRANSFORMERS[variant]
        return ViViT(LFQ(8), patch, 32, 2, layers, window=window).eval()
    levels = len(VARIANTS[variant]["channels"])
    model = MAGVIT2(LFQ(8), blocks=(1,) * levels, kernels=((3, 3, 3),) * levels, **VARIANTS[variant]).eval()
    for part in model.modules():
        if isinstance(part, AdaptiveNorm):  # which begins as a plain one
            torch.nn.init.normal_(part.style.weight, std=0.3)
    return model


def noise(frames: int) -> torch.Tensor:
    return torch.rand(1, 3, frames, 32, 32) * 2 - 1


@pytest.fixture(params=[*VARIANTS, *TRANSFORMERS], scope="module")
def whole(request) -> tuple[VideoTokenizer, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokenizer = make(request.param)
    video = noise(1 + 6 * tokenizer.compression[0])
    ids = tokenizer.encode(video)
    return tokenizer, video, ids, tokenizer.decode(ids)


@pytest.mark.parametrize("pieces", [1, 3, 100])
@pytest.mark.parametrize("latent_frames", [1, 2, 7])
def test_a_stream_equals_the_whole_clip(whole, pieces, latent_frames):
    tokenizer, video, ids, pixels = whole
    made = list(encode_stream(tokenizer, video.split(pieces, 2), latent_frames))
    assert torch.equal(torch.cat(made, 1), ids) and all(part.shape[1] <= latent_frames for part in made)
    made = list(decode_stream(tokenizer, ids.split(pieces, 1), latent_frames))
    assert torch.equal(torch.cat(made, 2), pixels)


def test_pieces_come_as_soon_as_they_can(whole):
    tokenizer, video, _, _ = whole
    taken = []

    def frames():
        for frame in video.split(1, 2):
            taken.append(frame)
            yield frame

    stream = encode_stream(tokenizer, frames(), latent_frames=1)
    for k in range(3):
        assert next(stream).shape[1] == 1 and len(taken) == 1 + k * tokenizer.compression[0]


def test_what_is_remembered_does_not_grow(whole):
    tokenizer, video, _, _ = whole
    step, encoded, decoded, sizes = tokenizer.compression[0], {}, {}, []
    for piece in video.split([1 + 3 * step, step, step, step], 2):  # the first piece is larger, and not kept
        tokenizer.decode(tokenizer.encode(piece, encoded), decoded)
        sizes.append(sum(t.untyped_storage().nbytes() for past in (encoded, decoded) for t in past.values()))
    assert len(set(sizes)) == 1 and sizes[0] > 0


def test_a_stream_that_ends_between_latent_frames_is_refused():
    tokenizer = make()
    with pytest.raises(ValueError, match=r"1 \+ 4k frames"):
        list(encode_stream(tokenizer, noise(7).split(3, 2), 1))


CHILD = """
import sys, torch
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.streaming import decode_stream, encode_stream

torch.set_num_threads(1)
torch.manual_seed(0)
tokenizer = MAGVIT2(LFQ(18), channels=(16, 16, 16, 32), blocks=(1, 1, 1, 1), adaptive=True).eval()

def peak():  # in kB; getrusage's would be that of the process that started this one, if that was larger
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def frames(count):
    for i in range(count):
        yield torch.rand(1, 3, 1, 128, 128) * 2 - 1

with torch.inference_mode():
    before = peak()
    ids = encode_stream(tokenizer, frames(int(sys.argv[1])), 2)  # pieces of 5, 8, 8, ... frames: 17 have full ones too
    made = sum(piece.shape[2] for piece in decode_stream(tokenizer, ids, 2))
assert made == int(sys.argv[1])
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_long_streams_take_no_more_memory_than_short_ones():
    """Measured (kB): 616,912 with 17 frames and 619,064 with 129, of which 311,700 before the first frame."""
    where = os.pathsep.join([str(Path(__file__).parents[1] / ".links"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # otherwise glibc's heap frays, by 7 % and differently each time
    found = {}
    for frames in (17, 129):
        run = [sys.executable, "-c", CHILD, str(frames)]
        out = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
        found[frames] = [int(word) for word in out.split()]
    assert found[129][1] <= 1.05 * found[17][1]
    own = {frames: after - before for frames, (before, after) in found.items()}  # what the stream itself takes
    assert own[129] <= 1.05 * own[17]
