"""Public tokenizers of the library diffusers behind our interface: the networks are theirs, frames and scales are ours.

`engine/outside.py` reads their folders. All take whole clips: what a stream has to remember is hidden inside of them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from reelm.tokenizers.quantizers import Continuous
from reelm.tokenizers.tokenizer import Past, Triple, VideoTokenizer

SETTLED = 100  # as many batches as published statistics count for where training went on


def made(kind: str, config: dict[str, Any]) -> nn.Module:
    """A model of diffusers with random weights; ValueError where it cannot be made."""
    try:
        import diffusers  # seconds, and only who has such a tokenizer pays them

        target = getattr(diffusers, kind, None)
    except (ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{kind} needs diffusers, which does not load ({why}): pip install reelm[outside]") from None
    if target is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {kind}: pip install -U reelm[outside]")
    taken = inspect.signature(target.__init__).parameters
    try:
        return target(**{name: value for name, value in config.items() if name in taken})
    except Exception as error:  # whatever a wrong value leads to in there
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the configuration does not describe an {kind}: {why}") from None


class Diffusers(VideoTokenizer):
    """A tokenizer of diffusers with continuous latents. `encode` gives the means of its posterior, shifted and scaled
    by the numbers in its configuration, as the models that denoise them expect them.

    Args:
        config: the arguments of the class `kind`; others are ignored.
    """

    kind: str
    streams = False

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = made(self.kind, config)
        names = [name for name in inspect.signature(type(self.model).__init__).parameters if name != "self"]
        self.config = {name: self.model.config[name] for name in names}  # with the defaults that were in force
        self.dim, self.compression = self.layout()
        self.quantizer = self.scaling()

    def layout(self) -> tuple[int, Triple]:
        """Latent channels, and pixel frames, rows and columns of a latent."""
        raise NotImplementedError

    def scaling(self) -> nn.Module:
        """What makes tokens of latents."""
        config, scaled = self.config, Continuous(self.dim)
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None and len(config[name]) != self.dim:
                raise ValueError(f"this {self.kind} has {self.dim} channels, but {len(config[name])} {name}")
        scaled.mean += torch.tensor(config.get("latents_mean") or 0.0) + (config.get("shift_factor") or 0.0)
        deviation = torch.tensor(config.get("latents_std") or 1.0) / (config.get("scaling_factor") or 1.0)
        scaled.variance.copy_(deviation.square())
        scaled.batches.fill_(SETTLED)
        return scaled

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        self.check(video, past)
        return self.model.encode(video).latent_dist.mode()

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        return self.model.decode(latents).sample


class ImageVAE(Diffusers):
    """`AutoencoderKL`, the image VAE of latent diffusion (arXiv:2112.10752): each frame by itself."""

    kind = "AutoencoderKL"

    def layout(self) -> tuple[int, Triple]:
        side = 2 ** (len(self.config["block_out_channels"]) - 1)
        return self.config["latent_channels"], (1, side, side)

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        self.check(video, past)
        frames = [self.model.encode(frame).latent_dist.mode() for frame in video.unbind(2)]  # one: memory stays bounded
        return torch.stack(frames, 2)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        return torch.stack([self.model.decode(frame).sample for frame in latents.unbind(2)], 2)


class Wan(Diffusers):
    """`AutoencoderKLWan`, the causal video VAE of Wan (arXiv:2503.20314)."""

    kind = "AutoencoderKLWan"

    def layout(self) -> tuple[int, Triple]:
        config = self.config
        time = 2 ** sum(config["temperal_downsample"])
        if time != 4:  # which its code takes for granted
            raise ValueError(f"{self.kind} goes in steps of 4 frames; temperal_downsample makes {time} of this one")
        side = 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)
        return config["z_dim"], (time, side, side)


class CogVideoX(Diffusers):
    """`AutoencoderKLCogVideoX`, the video VAE of CogVideoX (arXiv:2408.06072).

    It takes 1 + 4k frames, but is not strictly causal: its norms look at eight frames at once, so that the latents of
    a prefix are near to, not equal to, the prefix of the latents.
    """

    kind = "AutoencoderKLCogVideoX"

    def layout(self) -> tuple[int, Triple]:
        config = self.config
        side = 2 ** (len(config["block_out_channels"]) - 1)
        return config["latent_channels"], (int(config["temporal_compression_ratio"]), side, side)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        # An even number of latent frames it takes for a clip without a first frame, and makes 4 frames of each. With
        # the first one twice their number is odd; what the repeated one shows is left out.
        if latents.shape[2] % 2:
            return super().decode_latents(latents)
        return super().decode_latents(torch.cat([latents[:, :, :1], latents], 2))[:, :, self.compression[0] :]


class Codes(nn.Module):
    """The quantizer of a discrete VidTok, whose latents come out of it quantized already."""

    def __init__(self, regularization: nn.Module) -> None:
        super().__init__()
        self.regularization = regularization
        self.dim = self.inputs = regularization.dim
        self.vocabulary = int(regularization.codebook_size)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return z, self.regularization.codes_to_indices(z.movedim(1, -1)).long(), {}

    def lookup(self, ids: Tensor) -> Tensor:
        return self.regularization.indices_to_codes(ids.flatten(1)).unflatten(1, ids.shape[1:]).movedim(-1, 1)


class VidTok(Diffusers):
    """`AutoencoderVidTok` (VidTok, arXiv:2412.13061), those that are causal: discrete with finite scalar quantization
    ("fsq"), continuous with a posterior ("kl"), which it leaves unscaled.
    """

    kind = "AutoencoderVidTok"

    def layout(self) -> tuple[int, Triple]:
        if not self.config["is_causal"]:
            raise ValueError(f"this {self.kind} has is_causal=false; only causal ones can be taken")
        side = 2 ** len(self.model.encoder.spatial_ds)
        return self.config["z_channels"], (self.model.temporal_compression_ratio, side, side)

    def scaling(self) -> nn.Module:
        return Codes(self.model.regularization) if self.config["regularizer"] == "fsq" else super().scaling()

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        self.check(video, past)
        # not `encode`, which leaves out the frames that it wants before the first one
        made = self.model(video, sample_posterior=False, encoder_mode=True)
        return made[0] if self.config["regularizer"] == "fsq" else made

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        return self.model.decode(latents)


KINDS = {kind.kind: kind for kind in (ImageVAE, Wan, CogVideoX, VidTok)}
