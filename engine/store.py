"""Models as folders: `config.json` + `model.safetensors`, nothing in which can run code.

A model's configuration is its constructor's arguments, which it keeps as attributes of the same names (the convention
of scikit-learn's estimators), so `describe(model)` needs no help from whoever built it and `build` is its inverse.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from reelm.data.writing import whole_file

ALLOWED = ("reelm.tokenizers.", "reelm.lm.", "reelm.diffusion.", "reelm.tasks.")


def describe(value: Any) -> Any:
    """The JSON description of a model, or of one of its constructor's arguments."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    kind = type(value)
    config = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
    for name in list(inspect.signature(kind.__init__).parameters)[1:]:
        config[name] = describe(getattr(value, name))
    return config


def build(config: Any) -> Any:
    """The object that `describe` described. Only classes of this package's model folders can be named."""
    if isinstance(config, list):
        return [build(item) for item in config]
    if not isinstance(config, dict):
        return config
    arguments = {key: build(item) for key, item in config.items() if key != "_target_"}
    if "_target_" not in config:
        return arguments
    target = str(config["_target_"])
    module, _, name = target.rpartition(".")
    if not target.startswith(ALLOWED) or not name.isidentifier():
        raise ValueError(f"the model's config names {target}; only classes of {', '.join(ALLOWED)} may be loaded")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"the model's config names {target}, which this version of reelm does not have") from None
    if not inspect.isclass(kind) or kind.__module__ != module:
        raise ValueError(f"the model's config names {target}, which is not a class of reelm")
    return kind(**arguments)


def _packed(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"weights are saved as float32, bfloat16 or int8; got {dtype}")
    packed = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu().contiguous()
        if dtype == "int8" and weight.ndim >= 2:
            # symmetric, one scale a row (output channel)
            rows = weight.float().flatten(1)
            scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
            scale = scale.bfloat16().float()  # short, so that what is loaded is saved as the same numbers again
            packed[name] = (rows / scale).round().to(torch.int8).view(weight.shape).contiguous()
            packed[f"{name}.scale"] = scale.squeeze(1)
        elif dtype != "float32" and weight.is_floating_point() and weight.ndim >= 2:
            packed[name] = weight.to(torch.bfloat16)
        else:
            packed[name] = weight.clone()
    return packed


def save(model: nn.Module, folder: str | Path, dtype: str | None = None, notes: dict[str, Any] | None = None) -> None:
    """Writes the folder; `dtype` float32, bfloat16 or int8 (rows scaled; vectors stay float32).

    Without a `dtype` it is that of the folder the model was loaded from (whose weights it then reproduces), or float32.
    """
    folder, dtype = Path(folder), dtype or getattr(model, "stored_dtype", "float32")
    description = describe(model)
    if not description["_target_"].startswith(ALLOWED):
        raise ValueError(f"a {type(model).__name__} cannot be stored: such a folder could not be loaded without code")
    packed = _packed(model.state_dict(), dtype)
    config = {"model": description, "dtype": dtype, "notes": notes or {}}
    with whole_file(folder / "model.safetensors") as part:
        part.write_bytes(save_tensors(packed))  # `save_file` would let nobody else read it, and has errors of its own
    with whole_file(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no model at {path.parent}: {path.name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not a JSON file; was it cut off? Write the model again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not describe a reelm model")
    return config


def load(folder: str | Path) -> nn.Module:
    """The model of a folder, in float32 and eval mode."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    try:
        model = build(config["model"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the config of {folder} does not fit this version of reelm: {error}") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"the config of {folder} describes no model")
    model.stored_dtype = config.get("dtype", "float32")
    load_weights(model, folder / "model.safetensors")
    return model.eval().requires_grad_(False)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a model from a safetensors file written by `save`."""
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path} holds weights of another model: {str(error).splitlines()[-1].strip()}") from None


def part_of(folder: str | Path, part: str) -> Path:
    """The sub-folder of a whole model in which a part of it is, or the folder itself where it is of that part."""
    return Path(folder) / part if (Path(folder) / part).is_dir() else Path(folder)


@torch.no_grad()
def grow(model: nn.Module, folder: str | Path, part: str) -> None:
    """Begins a model with the weights of a smaller one (`part_of` a folder).

    A larger tensor has the stored one in its first entries; what new inputs contribute is 0, and blocks that the
    smaller model lacks begin as the identity where they can, so that a deeper model computes what the smaller one did.
    Modules that know better have a method `inflate`: an image tokenizer becomes one of video. Arguments in a module's
    `cannot_grow` lay out its weights, so that the first entries of a larger tensor would be others.

    Raises ValueError where the stored model is no smaller one.
    """
    folder = part_of(folder, part)
    small = load(folder)
    weights, own, parts = small.state_dict(), model.state_dict(), dict(small.named_modules())
    for name, module in model.named_modules():
        for argument in getattr(module, "cannot_grow", ()) if name in parts else ():
            here, there = (getattr(each, argument, None) for each in (module, parts[name]))
            if here != there:
                raise ValueError(f"{folder} has {argument}={there}, which cannot grow to {here}; set the same")
    for name, module in reversed(list(model.named_modules())):  # a whole after its parts
        if hasattr(module, "inflate") and name in parts:
            module.inflate(weights, name, parts[name])
    for name, weight in weights.items():
        target = own.get(name)
        here, there = () if target is None else tuple(target.shape), tuple(weight.shape)
        smaller = len(here) == len(there) and all(a >= b for a, b in zip(here[:2], there[:2], strict=True))
        if target is None or not smaller or here[2:] != there[2:]:
            what = f"{here} here" if target is not None else "which this one has not"
            raise ValueError(f"{folder} holds weights of another model: {name} is {there}, {what}")
        if target.ndim > 1:
            target[: there[0]] = 0
        target[tuple(slice(size) for size in there)] = weight
    for name, module in model.named_modules():
        if hasattr(module, "begin_as_identity") and name not in parts:
            module.begin_as_identity()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file written by `save`, those of floats in float32."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    weights = {}
    for name, weight in stored.items():
        if weight.dtype == torch.int8:
            scale = stored.get(f"{name}.scale")
            if scale is None or scale.shape != weight.shape[:1]:
                raise ValueError(f"{path} holds {name} as int8 without one scale a row")
            weight = weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))
        if not (name.endswith(".scale") and stored.get(name[: -len(".scale")], weight).dtype == torch.int8):
            weights[name] = weight.float() if weight.is_floating_point() else weight
    return weights


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's description and weights, to tell which tokenizer made which tokens.

    What a model names in `decoding_only` does not count: a tokenizer's decoder can be trained on, and its tokens stay.
    """
    ignored = getattr(model, "decoding_only", ())
    description = {name: value for name, value in describe(model).items() if name not in ignored}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        if name.partition(".")[0] in ignored:
            continue
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
