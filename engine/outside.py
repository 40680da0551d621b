"""Tokenizers that others trained, from local folders: those of diffusers, and TorchScript programs where trusted.

Of diffusers only `config.json` and safetensors files are read: nothing in them can run code.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reelm.engine import store
from reelm.engine.torchscript import ENCODER, TorchScript
from reelm.tokenizers.outside import KINDS, Diffusers

NAME = "diffusion_pytorch_model"  # what diffusers calls its weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# what the attention of `AutoencoderKL` was called in the days of Stable Diffusion 1
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(folder: str | Path, trust: bool = False) -> nn.Module:
    """The model of a folder: one of ours (`store.load`), a tokenizer of diffusers, or TorchScript programs if `trust`.

    In float32 and eval mode. Raises FileNotFoundError, ValueError: no such folder, or nothing that may be loaded.
    """
    folder = Path(folder)
    if (folder / ENCODER).is_file():
        return TorchScript(folder, trust).eval().requires_grad_(False)
    if (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a pipeline of diffusers; name the folder of its tokenizer: {folder / 'vae'}")
    config = store.read_json(folder / "config.json")
    return _diffusers(folder, config) if "_class_name" in config else store.load(folder)


def _diffusers(folder: Path, config: dict[str, Any]) -> Diffusers:
    kind = str(config["_class_name"])
    if kind not in KINDS:
        raise ValueError(f"{folder} holds an {kind}; of diffusers {', '.join(KINDS)} can be taken")
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights |= store.read_weights(path)
    try:
        tokenizer = KINDS[kind](config)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the config of {folder} does not describe an {kind}: {error}") from None
    try:
        tokenizer.model.load_state_dict({_renamed(name): weight for name, weight in weights.items()})
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder} holds weights of another model than its config.json says: {why}") from None
    return tokenizer.eval().requires_grad_(False)


def _renamed(name: str) -> str:
    return re.sub(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{RENAMED[m[2]]}.", name)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: ours, programs, or those of diffusers: one, one in parts, or one of a variant."""
    for pattern in ("model.safetensors", "*coder.jit", f"{NAME}.safetensors", f"{NAME}-*-of-*.safetensors"):
        if found := sorted(folder.glob(pattern)):
            return found
    variants = sorted(folder.glob(f"{NAME}.*.safetensors"))
    if len(variants) == 1:
        return variants
    if variants:
        names = ", ".join(path.name for path in variants)
        raise ValueError(f"{folder} holds several variants ({names}); leave one, or call it {NAME}.safetensors")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds weights as {pickles[0]}, a pickle, which can run code and is not opened; "
            "have them as safetensors (save_pretrained writes them so)"
        )
    raise FileNotFoundError(f"no weights in {folder}: {NAME}.safetensors is missing")


def weights_digest(folder: Path) -> str:
    """A short hash of a folder's weights."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
