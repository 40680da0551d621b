"""3-D convolutions that give a frame the same numbers however long the clip is, in float32 on a CPU.

Left to itself, torch takes oneDNN for a large input and loops of its own for a small one. The loops are 3 to 10 times
slower, and the two differ in the last bits, so a clip's frames were not those of the clip cut shorter. oneDNN, for its
part, cuts a kernel over time into blocks by the clip's length. So here it is always oneDNN, and a kernel over time is a
sum of 2-D kernels, each of them applied to frames one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channels_last(x: Tensor) -> Tensor:
    """`(B, C, ...)` with channels last in memory. The strides of sides of 1, which mean nothing, are made those of a
    longer clip's: kernels are chosen by them."""
    last = x.movedim(1, -1).contiguous()
    return last.view(-1).view(last.shape).movedim(-1, 1)


def frames_of(x: Tensor) -> Tensor:
    """`(B, C, T, H, W)` as pictures `(B * T, C, H, W)`: a view of what has channels last, if it is one clip."""
    return channels_last(x.movedim(1, -1).flatten(0, 1).movedim(-1, 1))


def clips_of(frames: Tensor, batch: int) -> Tensor:
    """The inverse of `frames_of`."""
    return frames.movedim(1, -1).unflatten(0, (batch, -1)).movedim(-1, 1)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, in float32 on a CPU by oneDNN and independent of the clip's length; elsewhere as torch has it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not always_onednn(x, weight) or self.groups > 1 or self.padding[0]:
            return super()._conv_forward(x, weight, bias)
        taps = self.kernel_size[0]
        length = x.shape[2] - taps + 1
        if taps == 1 or self.stride[0] > 1 or length < 1:
            return torch.mkldnn_convolution(
                channels_last(x), weight, bias, self.padding, self.stride, self.dilation, self.groups
            )
        total = None
        for tap in range(taps):
            part = torch.mkldnn_convolution(
                frames_of(x[:, :, tap : tap + length]), weight[:, :, tap], bias,
                self.padding[1:], self.stride[1:], self.dilation[1:], self.groups,
            )  # fmt: skip
            total, bias = part if total is None else total.add_(part), None
        return clips_of(total, len(x))


def always_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the choice is ours: bfloat16 goes to oneDNN anyway, and a compiler has its own ways."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    onednn = torch.backends.mkldnn
    return x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and onednn.is_available() and onednn.enabled
