"""Lighter weights in linear layers, for decoding, which reads all of them for few tokens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.lm.language_model import LanguageModel
from reelm.lm.linear import in_full

FORMATS = ("float32", "bfloat16", "int8")
GAIN = 1.2  # a lighter format is worth its rounding from this speed-up on
ROWS = (2, 32)  # vectors at a time that are timed: a token with guidance, and a window of tokens


def _integer_kernels() -> bool:
    return "x86" in torch.backends.quantized.supported_engines


def _bfloat16(weight: Tensor) -> Callable[[Tensor], Tensor]:
    light = weight.detach().bfloat16()
    return lambda x: F.linear(x.bfloat16(), light).to(x.dtype)


def _int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Weights with one scale an output. On CPUs with integer products of inputs that share one scale a call."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
    if weight.device.type == "cpu" and _integer_kernels():
        torch.backends.quantized.engine = "x86"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the kernels stay, their tensors are said to go
            zero = torch.zeros(len(scale), dtype=torch.long)
            packed = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(packed, None)
        product = torch.ops.quantized.linear_dynamic.default._op  # spared a search for its backend at each call
        return lambda x: product(x.float(), packed).to(x.dtype)
    light, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        return torch._weight_int8pack_mm(flat, light, scale).to(x.dtype).view(*x.shape[:-1], -1)

    return product


PACKERS = {"bfloat16": _bfloat16, "int8": _int8}


def _matrices(lm: LanguageModel) -> list[nn.Parameter]:
    """Those that vectors are multiplied with."""
    found = [module.weight for module in lm.modules() if isinstance(module, nn.Linear)]
    head = getattr(lm.visual, "codes", lm.visual)  # a masked head predicts through another
    if getattr(head, "tied", False):
        tables = (m for m in head.modules() if isinstance(m, nn.Embedding) and m is not head.others)
        found += [table.weight for table in tables]
    return found


def fastest(lm: LanguageModel, rounds: int = 5, formats: Sequence[str] = FORMATS) -> str:
    """The format in which this machine multiplies with this model's matrices fastest; a few milliseconds of trying.

    float32 unless another is at least `GAIN` times as fast, since only it changes nothing.
    """
    if not hasattr(lm.transformer, "blocks"):
        return "float32"
    block = [module.weight for module in lm.transformer.blocks[0].modules() if isinstance(module, nn.Linear)]
    inputs = [[torch.randn(rows, weight.shape[1], device=weight.device) for weight in block] for rows in ROWS]
    arms: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for name in formats:
        try:
            arms[name] = [PACKERS[name](w) if name in PACKERS else lambda x, w=w: in_full(x, w) for w in block]
            _run(arms[name], inputs)
        except (RuntimeError, NotImplementedError):  # this machine has no such product
            arms.pop(name, None)
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(rounds):
        for name, layers in arms.items():
            started = time.perf_counter()
            _run(layers, inputs)
            best[name] = min(best[name], time.perf_counter() - started)
    winner = min(best, key=best.__getitem__)
    return winner if best[winner] * GAIN <= best["float32"] else "float32"


@torch.inference_mode()
def _run(layers: list[Callable[[Tensor], Tensor]], inputs: list[list[Tensor]]) -> None:
    for rows in inputs:
        for layer, x in zip(layers, rows, strict=True):
            layer(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def lighten(lm: LanguageModel, dtype: str, compiled: bool = False) -> str:
    """Lets the model multiply in this format where it does not learn; returns the format.

    The weights themselves stay as they are; they must not change afterwards.

    Args:
        dtype: one of `FORMATS`, or "auto" for the fastest on this machine.
        compiled: passes will be compiled (compiled.py), which a CPU's integer kernels are not fit for.
    """
    integers = not compiled or next(lm.parameters()).is_cuda
    if dtype == "int8" and not integers:
        raise ValueError("dtype=int8 cannot be compiled on a CPU; leave compile=true out, or take dtype=float32")
    if dtype not in (*FORMATS, "auto"):
        raise ValueError(f"dtype is one of auto, {', '.join(FORMATS)}; got {dtype}")
    dtype = fastest(lm, formats=FORMATS if integers else FORMATS[:2]) if dtype == "auto" else dtype
    for weight in _matrices(lm):
        weight.light = PACKERS[dtype](weight) if dtype in PACKERS else None
    # keys and values come out of such products, so to keep them in more precision would only take room
    lm.transformer.cache_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    return dtype
