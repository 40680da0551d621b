"""Other projects' video tokenizers, to be measured beside ours: random weights, as many parameters as asked for.

All have causal convolutions and 4 x 8 x 8 pixels to a latent, in the proportions in which their projects publish them;
what varies is their width.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

CODES = 2**18  # of the discrete ones


@dataclass(frozen=True)
class Codec:
    """Something that encodes clips `(B, 3, T, H, W)` and decodes what it made of them.

    parameters: of its encoder and its decoder together.
    """

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    parameters: int


def count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def ours(model: nn.Module) -> Codec:
    """A `VideoTokenizer` whose parts are `encoder` and `decoder`."""
    return Codec(model.encode, model.decode, count([model.encoder, model.decoder]))


def vidtok(width: int) -> Codec:
    """VidTok with finite scalar quantization (https://arxiv.org/abs/2412.13061)."""
    model = importlib.import_module("diffusers").AutoencoderVidTok(
        ch=width, z_channels=6, double_z=False, regularizer="fsq", codebook_size=CODES
    )
    first = model.temporal_compression_ratio - 1  # frames that its `forward` puts before the clip

    def encode(video: Tensor) -> Tensor:
        return model.encode(F.pad(video, (0, 0, 0, 0, first, 0), mode="replicate"))[1]

    def decode(ids: Tensor) -> Tensor:
        return model.decode(ids, decode_from_indices=True)

    model.eval()
    return Codec(encode, decode, count([model.encoder, model.decoder]))


def cogvideox(width: int) -> Codec:
    """The autoencoder of CogVideoX (https://arxiv.org/abs/2408.06072), whose latents are continuous.

    width: a quarter of the channels at the deepest level; that of the others in steps of 4, which groups of norms take.
    """
    fine = max(4 * round(width / 4), 4)
    model = importlib.import_module("diffusers").AutoencoderKLCogVideoX(
        block_out_channels=(fine, 2 * fine, 2 * fine, 4 * width), norm_num_groups=4
    )

    def encode(video: Tensor) -> Tensor:
        return model.encode(video).latent_dist.mode()

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents).sample

    model.eval()
    return Codec(encode, decode, count([model.encoder, model.decoder]))


# the layers of the example in its README
LAYERS = (
    "residual", "compress_space", ("consecutive_residual", 2), "compress_space", ("consecutive_residual", 2),
    "linear_attend_space", "compress_space", ("consecutive_residual", 2), "attend_space", "compress_time",
    ("consecutive_residual", 2), "compress_time", ("consecutive_residual", 2), "attend_time",
)  # fmt: skip


def magvit2_pytorch(width: int) -> Codec:
    """magvit2-pytorch's `VideoTokenizer`; width: half of the channels at the deepest levels, 8 times the first's."""
    absent("torchvision")
    absent("torchvision.models", VGG16_Weights=type("VGG16_Weights", (), {"DEFAULT": None}))
    absent("magvit2_pytorch.trainer", VideoTokenizerTrainer=None)
    model = importlib.import_module("magvit2_pytorch.magvit2_pytorch").VideoTokenizer(
        image_size=128, init_dim=max(width // 4, 2), max_dim=2 * width, layers=LAYERS, codebook_size=CODES,
        use_gan=False, perceptual_loss_weight=0.0,
    )  # fmt: skip
    del model.discr  # made even where it is not used

    def encode(video: Tensor) -> Tensor:
        return model.encode(video, quantize=True)[1]

    parts = (model.conv_in, model.encoder_layers, model.decoder_layers, model.conv_out)
    model.eval()
    return Codec(encode, model.decode_from_code_indices, count(parts))


def absent(name: str, **members: Any) -> None:
    """Puts an empty module in the place of one that is imported and, in what is measured, not used: torchvision is for
    the losses, and its build must be that of torch; the trainer asks for OpenCV and accelerate."""
    module = types.ModuleType(name)
    module.__dict__.update(members, __path__=[])
    sys.modules[name] = module


@dataclass(frozen=True)
class Peer:
    """build: the codec of a width. library: the module that has to be there."""

    build: Callable[[int], Codec]
    library: str


PEERS = {
    "VidTok": Peer(vidtok, "diffusers"),
    "CogVideoX": Peer(cogvideox, "diffusers"),
    "magvit2-pytorch": Peer(magvit2_pytorch, "magvit2_pytorch"),
}


def matched(build: Callable[[int], Codec], parameters: int) -> Codec:
    """The codec of the width whose count is nearest to `parameters`."""
    low, high = 1, 2
    while (above := build(high)).parameters < parameters:
        low, high = high, 2 * high
    below = build(low)
    while high - low > 1:
        middle = (low + high) // 2
        codec = build(middle)
        if codec.parameters < parameters:
            low, below = middle, codec
        else:
            high, above = middle, codec
    return min(below, above, key=lambda codec: abs(codec.parameters - parameters))


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# What its network needs of the packages that it asks for, beside torch and what reelm has, without torchvision, whose
# build has to be that of torch, and what only its trainer uses. They are put in a folder that only its worker sees.
OUTSIDE = (
    "magvit2-pytorch==0.5.1", "beartype==0.23.1", "gateloop-transformer==0.2.5", "jaxtyping==0.3.11",
    "kornia==0.9.0", "kornia-rs==0.2.0", "rotary-embedding-torch==0.9.1", "taylor-series-linear-attention==0.2.0",
    "wadler-lindig==0.1.8",
)  # fmt: skip
DONE = ".complete"


def install(folder: Path) -> Path:
    """The folder with magvit2-pytorch, made the first time. Raises RuntimeError, in one line, where pip cannot."""
    if (folder / DONE).is_file() and (folder / DONE).read_text().split() == list(OUTSIDE):
        return folder
    print(f"installing magvit2-pytorch into {folder}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *OUTSIDE], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RuntimeError(f"pip could not install it into {folder}: {why}")
    (folder / DONE).write_text("\n".join(OUTSIDE))
    return folder
