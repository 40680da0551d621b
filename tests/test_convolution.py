"""Convolutions are torch's in what they compute, and a frame's numbers do not depend on how long the clip is."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reelm.engine.benchmark import flops
from reelm.tokenizers.convolution import Conv3d, channels_last, clips_of, frames_of

CASES = {  # in, out, kernel, stride, padding
    "time and space": (8, 12, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
    "time alone": (8, 6, (3, 1, 1), (1, 1, 1), (0, 0, 0)),
    "space alone": (8, 12, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "a place": (8, 12, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "downwards in space": (8, 12, (3, 3, 3), (1, 2, 2), (0, 1, 1)),
    "downwards": (8, 12, (3, 3, 3), (2, 2, 2), (0, 1, 1)),
    "padded in time": (8, 12, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
}


def pair(case: str, bias: bool = True) -> tuple[Conv3d, nn.Conv3d]:
    cin, cout, kernel, stride, padding = CASES[case]
    ours = Conv3d(cin, cout, kernel, stride, padding, bias=bias).to(memory_format=torch.channels_last_3d)
    plain = nn.Conv3d(cin, cout, kernel, stride, padding, bias=bias)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def clip(batch: int = 2, frames: int = 7, size: int = 10, channels: int = 8) -> torch.Tensor:
    return channels_last(torch.randn(batch, channels, frames, size, size))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_torchs(case, bias, batch):
    results = []
    x = clip(batch)
    for conv in pair(case, bias):
        own = x.clone().requires_grad_()
        y = conv(own)
        (y.sin().sum()).backward()
        results.append([y, own.grad, *(p.grad for p in conv.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_in_double_precision_gradients_are_those_of_differences():
    ours = pair("time and space")[0].double()
    assert torch.autograd.gradcheck(ours, clip(1, 4, 3).double().requires_grad_())


@pytest.mark.parametrize("case", [case for case in CASES if case != "padded in time"])
@pytest.mark.parametrize(("channels", "size"), [(8, 4), (8, 16), (96, 16)])
def test_a_frame_is_the_same_in_clips_of_any_length(case, channels, size):
    _, _, kernel, stride, padding = CASES[case]
    conv = Conv3d(channels, channels, kernel, stride, padding).to(memory_format=torch.channels_last_3d)
    x = clip(1, 19, size, channels)  # torch alone changes its kernels where C * T * H passes 20,480
    with torch.no_grad():
        whole = conv(x)
        for frames in (kernel[0], kernel[0] + 1, 9):
            for part in (x[:, :, :frames], x[:, :, :frames].contiguous(), x[:, :, :frames].clone()):
                made = conv(part)
                assert torch.equal(made, whole[:, :, : made.shape[2]])
                assert torch.equal(conv(part.repeat(2, 1, 1, 1, 1))[1:], made) or kernel[0] == 1


def test_under_autocast_and_for_no_frames_it_is_torchs_own():
    ours, plain = pair("time and space")
    plain = plain.to(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = clip()
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), plain(x))
    with pytest.raises(RuntimeError):
        ours(clip(frames=2))


def test_frames_are_pictures_in_order_without_a_copy():
    x = clip(1)
    frames = frames_of(x)
    assert frames.shape == (7, 8, 10, 10) and torch.equal(frames[3], x[0, :, 3]) and frames.data_ptr() == x.data_ptr()
    assert torch.equal(clips_of(frames, 1), x)
    x = clip(3)
    assert torch.equal(clips_of(frames_of(x), 3), x)


def test_a_single_frame_is_laid_out_as_those_of_a_clip():
    x = clip(1)[:, :, :1]
    assert channels_last(x).stride() == (800, 1, 800, 80, 8) and channels_last(x).data_ptr() == x.data_ptr()
    assert channels_last(torch.randn(1, 8, 1, 10, 10)).stride() == (800, 1, 800, 80, 8)


@pytest.mark.parametrize("case", ["time and space", "space alone", "downwards"])
def test_its_operations_are_counted(case):
    ours, plain = pair(case)
    x = clip()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(x)
    with torch.no_grad():
        assert flops(lambda: ours(x)) == counter.get_total_flops() > 0


@pytest.mark.slow
def test_it_compiles():
    ours, plain = pair("time and space")
    x = clip()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True)(x), plain(x), rtol=1e-4, atol=1e-5)
