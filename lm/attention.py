"""Prefix-LM attention: one function, several ways to compute it.

Column i sees column j where `j <= i` or `j < prefix`. Queries may be fewer than keys: they are then the last columns,
as in decoding with a cache. All backends equal `reference`; they differ in speed and in where they run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def visible(queries: int, keys: int, prefix: int, device: torch.device | str | None = None) -> Tensor:
    """Which keys each query sees: `(queries, keys)` bool."""
    columns = torch.arange(keys, device=device)
    return (columns <= columns[keys - queries :, None]) | (columns < prefix)


def _repeat(q: Tensor, *kv: Tensor) -> list[Tensor]:
    """Keys and values with one head for each query head."""
    groups = q.shape[1] // kv[0].shape[1]
    return [t.repeat_interleave(groups, 1) if groups > 1 else t for t in kv]


def by_the_book(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """In float32, with an explicit mask `(Lq, Lk)`."""
    k, v = _repeat(q, k, v)
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.float()).to(v.dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """The oracle of the tests."""
    return by_the_book(q, k, v, visible(q.shape[2], k.shape[2], prefix, q.device))


@functools.lru_cache(maxsize=16)
def _bias(queries: int, keys: int, prefix: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what validation made is for training too
        hidden = ~visible(queries, keys, prefix, device)
        return torch.zeros(1, queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _math(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """Two batched products with a dense softmax between them. For CPUs only.

    With bfloat16 instructions (AVX-512) a step forward and backward takes about a third of the time of torch's fused
    CPU kernel, which does not use them; elsewhere the dense scores are the slow way.
    """
    k, v = _repeat(q, k, v)
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    make = _bias.__wrapped__ if torch.compiler.is_compiling() else _bias  # compiled, the mask is part of the product
    bias = make(q.shape[1], k.shape[1], prefix, q.dtype, q.device)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.baddbmm(bias.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), v).view(shape)


def _two_calls(q: Tensor, k: Tensor, prefix: int) -> tuple[int, int]:
    """Number of queries inside the prefix, and of keys that these see."""
    before = k.shape[2] - q.shape[2]
    return min(max(prefix - before, 0), q.shape[2]), prefix


def _sdpa(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """Torch's fused kernels: full attention for the queries of the prefix, causal for the rest, no dense mask."""
    inside, seen = _two_calls(q, k, prefix)
    grouped = k.shape[1] != q.shape[1]
    parts = []
    if inside:
        keys = (k[:, :, :seen], v[:, :, :seen])
        parts.append(F.scaled_dot_product_attention(q[:, :, :inside], *keys, enable_gqa=grouped))
    rest = q.shape[2] - inside
    if rest == 1:  # the newest column sees all
        parts.append(F.scaled_dot_product_attention(q[:, :, inside:], k, v, enable_gqa=grouped))
    elif rest and q.shape[2] == k.shape[2] and (not inside or q.device.type == "cpu"):
        # is_causal counts from the first row, so all rows take part and those of the prefix are dropped
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        parts.append(causal[:, :, inside:])
    elif rest and q.device.type == "cpu" and not torch.is_grad_enabled():
        # a window of tokens in decoding: a mask would be made here in any case, and so it is made once for all layers
        bias = _bias(rest, k.shape[2], 0, q.dtype, q.device)
        window = q[:, :, inside:]
        parts.append(F.scaled_dot_product_attention(window, k, v, attn_mask=bias, enable_gqa=grouped))
    elif rest:
        k, v = _repeat(q, k, v)
        bias = causal_lower_right(rest, k.shape[2])
        parts.append(F.scaled_dot_product_attention(q[:, :, inside:], k, v, attn_mask=bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@functools.cache
def _flash_function(name: str = "flash_attn_func") -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
    """A function of FlashAttention, of whichever of its packages loads (2, 3 or 4), or None.

    The name `flash_attn` alone proves nothing: version 4 leaves it as an empty namespace.
    """
    for module in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        try:
            function = getattr(importlib.import_module(module), name, None)
        except (ImportError, OSError, RuntimeError):
            continue
        if function is not None:
            return function
    return None


def has_flash(q: Tensor, name: str = "flash_attn_func") -> bool:
    """Whether `flash` has a function for these queries."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and _flash_function(name) is not None


def flash(q: Tensor, name: str = "flash_attn_func") -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A function of FlashAttention for these queries; ValueError where there is none."""
    function = _flash_function(name)
    if function is None or not q.is_cuda:
        raise ValueError("attention=flash needs a GPU and the package flash-attn; choose attention=sdpa")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention=flash needs 16-bit numbers, not {q.dtype}; choose attention=sdpa or 16 bits")
    return function


def _flash(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """FlashAttention as two calls; its causal mask counts from the last column, as ours does."""
    function = flash(q)
    inside, seen = _two_calls(q, k, prefix)

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    parts = []
    if inside:
        parts.append(call(q[:, :, :inside], k[:, :, :seen], v[:, :, :seen], causal=False))
    if inside < q.shape[2]:
        parts.append(call(q[:, :, inside:], k, v, causal=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@functools.lru_cache(maxsize=16)
def _block_mask(queries: int, keys: int, prefix: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    before = keys - queries

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query + before) | (key < prefix)

    with torch.inference_mode(False):
        return create_block_mask(mask, None, None, queries, keys, device=device)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """FlexAttention with a block mask, compiled on a GPU. On a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = _block_mask(q.shape[2], k.shape[2], prefix, q.device)
    function = compiled_flex() if q.is_cuda else flex_attention
    return function(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])


BACKENDS = {"reference": _reference, "sdpa": _sdpa, "flash": _flash, "flex": _flex, "math": _math}
CHOICES = ("auto", *BACKENDS)


def attention(q: Tensor, k: Tensor, v: Tensor, prefix: int, backend: str = "sdpa") -> Tensor:
    """Grouped-query prefix-LM attention.

    Args:
        q: `(B, heads, Lq, D)`, the last Lq of the Lk columns.
        k, v: `(B, kv_heads, Lk, D)`; kv_heads divides heads.
        prefix: number of leading columns that every column sees.
        backend: one of `BACKENDS`, or "auto": `math` for several bfloat16 queries on a CPU, otherwise `sdpa`.

    Returns `(B, heads, Lq, D)`.
    """
    if backend == "auto":
        backend = "math" if q.dtype is torch.bfloat16 and q.device.type == "cpu" and q.shape[2] > 1 else "sdpa"
    return BACKENDS[backend](q, k, v, prefix)
