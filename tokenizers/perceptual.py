"""LPIPS (https://arxiv.org/abs/1801.03924) from weight files that the user names; nothing is downloaded.

A file of ImageNet features (AlexNet or SqueezeNet 1.1, under torchvision's names) and one of the linear layers, both
`.npz` or `.safetensors`. Train with SqueezeNet and judge with AlexNet, so that no model is judged by its teacher.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class Fire(nn.Module):
    """SqueezeNet's block: a 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, cin: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def alexnet() -> tuple[nn.Sequential, list[int]]:
    """Feature layers and the indices after which LPIPS looks."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ), [1, 4, 7, 9, 11]  # fmt: skip


def squeezenet() -> tuple[nn.Sequential, list[int]]:
    pool = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool[0],
        Fire(64, 16, 64), Fire(128, 16, 64), pool[1],
        Fire(128, 32, 128), Fire(256, 32, 128), pool[2],
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    ), [1, 4, 7, 9, 10, 11, 12]  # fmt: skip


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Arrays of an .npz or .safetensors file in float32; pickled contents are refused."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; give the path of an .npz or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return {name: value.float() for name, value in load_file(path).items()}
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    except Exception as error:
        raise ValueError(f"{path} is not a readable .npz or .safetensors file of weights: {error}") from None


class LPIPS(nn.Module):
    """Perceptual distance of two videos, frame by frame.

    Args:
        features: file of AlexNet or SqueezeNet features (told apart by their names).
        linear: file of the LPIPS linear layers.
        frames: compares this many evenly spaced frames of each clip (None: all), to save time in training.
    """

    def __init__(self, features: str | Path, linear: str | Path, frames: int | None = None) -> None:
        super().__init__()
        weights = read_weights(features)
        lins = read_weights(linear)
        squeeze = any("squeeze" in name for name in weights)
        self.network = "squeeze" if squeeze else "alex"
        self.layers, self.taps = squeezenet() if squeeze else alexnet()
        try:
            self.layers.load_state_dict({name.removeprefix("features."): value for name, value in weights.items()})
            found = [lins[f"{self.network}.lin{i}.model.1.weight"] for i in range(len(self.taps))]
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{features} and {linear} do not hold LPIPS weights: {reason}") from None
        for i, weight in enumerate(found):
            if weight.ndim != 4 or weight.shape[0] != 1 or weight.shape[2:] != (1, 1):
                raise ValueError(f"{linear} does not hold LPIPS weights: layer {i} is {tuple(weight.shape)}")
        self.lins = nn.ParameterList(found)
        self.frames = frames
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of images `(N, 3, H, W)` in [-1, 1], at least 32 pixels a side: `(N,)`. Always in float32: differences
        of features that are nearly equal are lost in bfloat16."""
        with torch.autocast(a.device.type, enabled=False):
            return self._distances(a.float(), b.float())

    def _distances(self, a: Tensor, b: Tensor) -> Tensor:
        x = (torch.cat([a, b]) - self.shift) / self.scale
        total = x.new_zeros(len(a))
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                first, second = unit.chunk(2)
                total = total + F.conv2d((first - second).square(), self.lins[self.taps.index(index)]).mean((1, 2, 3))
        return total

    def forward(self, video: Tensor, target: Tensor) -> Tensor:
        """Mean distance of `(B, 3, T, H, W)` videos in [-1, 1]."""
        if self.frames is not None and self.frames < video.shape[2]:
            chosen = torch.linspace(0, video.shape[2] - 1, self.frames).round().long()
            video, target = video[:, :, chosen], target[:, :, chosen]
        return self.distances(video.transpose(1, 2).flatten(0, 1), target.transpose(1, 2).flatten(0, 1)).mean()
