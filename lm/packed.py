"""Packed sequences: several of different lengths and prefixes in one row, so that none is filled up.

A segment is `(columns, prefix)`. Within a segment attention is that of attention.py, between segments there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, fields
from itertools import groupby

import torch
from torch import Tensor

from reelm.lm.attention import attention, by_the_book, compiled_flex, flash, has_flash
from reelm.lm.sequence import Segments, Sequence


def in_one_row(parts: Many[Sequence]) -> Sequence:
    """All rows of all batches as the segments of one row; rows of the same batch stay together, as they are cheaper."""
    segments = tuple((part.length, part.prefix) for part in parts for _ in range(len(part)))
    tensors = {}
    for name in (f.name for f in fields(Sequence) if f.name not in ("prefix", "text", "segments")):
        values = [getattr(part, name) for part in parts]
        absent = [value is None for value in values]
        if any(absent) and not all(absent):
            raise ValueError(f"either all sequences of one row have {name} or none has")
        tensors[name] = None if any(absent) else torch.cat([value.flatten(0, 1) for value in values])[None]
    return Sequence(**tensors, prefix=0, segments=segments)


@dataclass(frozen=True)
class Tables:
    """What is known of each of L columns, and of the queries that see in both directions and of those that look back.

    number, place, prefix: `(L,)` of the column's segment, within it, and of its segment.
    inside, rest: the columns in prefixes and those after; order: where each column is in the one after the other.
    starts: `(S + 1,)` int32, where prefixes begin in `inside`, what is after them in `rest`, and segments in the row.
    longest: of each of the three.
    """

    number: Tensor
    place: Tensor
    prefix: Tensor
    inside: Tensor
    rest: Tensor
    order: Tensor
    starts: tuple[Tensor, Tensor, Tensor]
    longest: tuple[int, int, int]


@functools.lru_cache(maxsize=4)
def tables(segments: Segments, device: torch.device) -> Tables:
    """Made once a step for all layers, in a way that a pass with gradients can use what one without made."""
    with torch.inference_mode(False):
        return _tables(segments, device)


def _tables(segments: Segments, device: torch.device) -> Tables:
    lengths, prefixes = torch.tensor(segments).unbind(1)
    number = torch.arange(len(segments)).repeat_interleave(lengths)
    place = torch.arange(len(number)) - (lengths.cumsum(0) - lengths)[number]
    inside, rest = (place < prefixes[number]).nonzero()[:, 0], (place >= prefixes[number]).nonzero()[:, 0]
    counts = (prefixes, lengths - prefixes, lengths)
    starts = tuple(torch.cat([count.new_zeros(1), count.cumsum(0)]).to(device, torch.int32) for count in counts)
    columns = (number, place, prefixes[number], inside, rest, torch.cat([inside, rest]).argsort())
    return Tables(*(c.to(device) for c in columns), starts, tuple(int(count.max()) for count in counts))


@dataclass(eq=False)  # torch 2.11 compiles anew for each number of segments where a dataclass is frozen
class Packed:
    """Attention of one packed row (`View` of layouts.py).

    segments: of the row. backend: as for `attention`; auto is flash where that can run.
    """

    segments: Segments
    backend: str
    function: Callable[..., Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.function = _never_compiled()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `(1, heads, L, D)`, k and v `(1, kv_heads, L, D)`; returns `(1, heads, L, D)`."""
        return self.function(self, q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.backend == "flash" or (self.backend == "auto" and has_flash(q, VARLEN)):
            return _flash(q, k, v, tables(self.segments, q.device))
        if self.backend == "flex":
            return _flex(q, k, v, self.segments)
        if self.backend == "reference":
            return by_the_book(q, k, v, _visible(tables(self.segments, q.device)))
        return _in_batches(q, k, v, self.segments, self.backend)


@functools.cache
def _never_compiled() -> Callable[..., Tensor]:
    """The segments are others in each step; compiled, each would be a program of its own."""
    return torch.compiler.disable(Packed.attend)  # not where this is defined: it takes a second to import


def _visible(t: Tables) -> Tensor:
    back = t.place <= t.place[:, None]
    return (t.number == t.number[:, None]) & (back | (t.place < t.prefix))


def _in_batches(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str) -> Tensor:
    """Segments of one length and prefix that follow each other as a batch."""
    parts, start = [], 0
    for (length, prefix), run in groupby(segments):
        count = len(list(run))
        here = slice(start, start + count * length)
        rows = (t[0, :, here].unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v))
        parts.append(attention(*rows, prefix, backend).transpose(0, 1).flatten(1, 2))
        start = here.stop
    return torch.cat(parts, 1)[None]


VARLEN = "flash_attn_varlen_func"


def _flash(q: Tensor, k: Tensor, v: Tensor, t: Tables) -> Tensor:
    """FlashAttention for all segments in two calls: full among the prefixes, causal for the queries after them, which
    it takes for the last columns of their segment."""
    function = flash(q, VARLEN)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (L, heads, D)

    def call(queries: Tensor, keys: Tensor, values: Tensor, of: int, to: int, causal: bool) -> Tensor:
        out = function(
            queries, keys, values, cu_seqlens_q=t.starts[of], cu_seqlens_k=t.starts[to],
            max_seqlen_q=t.longest[of], max_seqlen_k=t.longest[to], causal=causal,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    parts = []
    if len(t.inside):
        parts.append(call(q[t.inside], k[t.inside], v[t.inside], 0, 0, causal=False))
    if len(t.rest):
        parts.append(call(q[t.rest], k, v, 1, 2, causal=True))
    return torch.cat(parts)[t.order].transpose(0, 1)[None]


@functools.lru_cache(maxsize=4)
def _block_mask(segments: Segments, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    t = tables(segments, device)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) | (t.place[key] < t.prefix[key])
        return (t.number[query] == t.number[key]) & seen

    with torch.inference_mode(False):
        return create_block_mask(mask, None, None, len(t.number), len(t.number), device=device)


def _flex(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """FlexAttention, which skips blocks that no segment reaches. On a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    function = compiled_flex() if q.is_cuda else flex_attention
    mask = _block_mask(segments, q.device)
    return function(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
