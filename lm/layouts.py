"""Attention layouts: which tokens of the grid see each other, layer by layer.

A layout narrows prefix-LM attention (attention.py) among the tokens of the grid, those with a time of 0 or more. Each
of them sees besides all that stands off the grid (text, conditions, delimiters) and its own column; what is off the
grid sees nothing of the grid, so that nothing of later frames comes back through it. A column asks for the place that
it predicts (`Sequence.next_positions`), its key stands at its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reelm.lm.attention import attention, compiled_flex

View = Callable[[Tensor, Tensor, Tensor], Tensor]  # attention of one layer, from q, k and v
AXES = ("time", "row", "column")


@dataclass(frozen=True)
class Layout:
    """What layouts share. Layer i follows rule i modulo `rules`; `channels` 2: a block has an attention for each."""

    rules = 1
    channels = 1

    def near(self, rule: int, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at places `(..., 3)` see keys at places `(..., 3)` of the grid, as far as there is order."""
        raise NotImplementedError

    def sees(self, rule: int, query: Tensor, key: Tensor, prefix: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Whether query number i, of the last ones, sees key number j, given the places `(Lq, 3)` and `(Lk, 3)`."""
        before = len(key) - len(query)

        def function(i: Tensor, j: Tensor) -> Tensor:
            asked, place = query[i], key[j]
            on_grid = (asked[..., 0] >= 0) & self.near(rule, asked, place)
            allowed = (j <= i + before) | (j < prefix)
            return allowed & ((j == i + before) | (place[..., 0] < 0) | on_grid)

        return function

    def mask(self, rule: int, query: Tensor, key: Tensor, prefix: int) -> Tensor:
        """The same as `(Lq, Lk)` bool."""
        rows, columns = (torch.arange(len(places), device=key.device) for places in (query, key))
        return self.sees(rule, query, key, prefix)(rows[:, None], columns)

    def views(self, query: Tensor, key: Tensor, prefix: int, backend: str) -> list[View]:
        """The attention of each rule, for all layers of a pass through the transformer.

        Args:
            query: `(Lq, 3)` places that the columns ask for; key: `(Lk, 3)` places of all columns up to them.
            backend: of `Transformer.attention`; flex, and auto on GPUs, never makes a dense mask.
        """
        flex = backend == "flex" or (backend == "auto" and key.is_cuda and len(query) > 1)
        make = _flex_view if flex else _dense_view
        return [make(self, rule, query, key, prefix) for rule in range(self.rules)]


def _dense_view(layout: Layout, rule: int, query: Tensor, key: Tensor, prefix: int) -> View:
    mask = layout.mask(rule, query, key, prefix)

    def view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])

    return view


def _flex_view(layout: Layout, rule: int, query: Tensor, key: Tensor, prefix: int) -> View:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sees = layout.sees(rule, query, key, prefix)
    mask = create_block_mask(lambda _, head, i, j: sees(i, j), None, None, len(query), len(key), device=key.device)

    def view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = compiled_flex() if q.is_cuda else flex_attention
        return function(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])

    return view


@dataclass(frozen=True)
class Axial(Layout):
    """Each layer looks along one axis of the grid, in turn (GODIVA, arXiv:2104.14806, section 3.2).

    axes: "row" are the tokens of one row of a frame, "column" those of one column, "time" those of one place.
    """

    axes: tuple[str, ...] = AXES

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        if not self.axes or set(self.axes) - set(AXES):
            raise ValueError(f"axes are some of {', '.join(AXES)}; got {self.axes}")

    @property
    def rules(self) -> int:
        return len(self.axes)

    def near(self, rule: int, query: Tensor, key: Tensor) -> Tensor:
        # along a row the column changes, and the other way round
        free = {"time": 0, "row": 2, "column": 1}[self.axes[rule]]
        first, second = (axis for axis in range(3) if axis != free)
        return (query[..., first] == key[..., first]) & (query[..., second] == key[..., second])


@dataclass(frozen=True)
class Nearby(Layout):
    """Each token sees those around it in space and time (3DNA; NUWA, arXiv:2111.12417, section 3.3).

    window: sides of the block in latent frames, rows and columns, odd, the token in its middle.
    """

    window: tuple[int, int, int] = (3, 3, 3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", tuple(self.window))
        if len(self.window) != 3 or any(side < 1 or side % 2 == 0 for side in self.window):
            raise ValueError(f"window is three odd numbers of 1 or more; got {self.window}")

    def near(self, rule: int, query: Tensor, key: Tensor) -> Tensor:
        time, row, column = ((query[..., i] - key[..., i]).abs() <= side // 2 for i, side in enumerate(self.window))
        return time & row & column


@dataclass(frozen=True)
class SpaceTime(Layout):
    """Layers within frames and layers along time in turn, these never looking ahead (Genie, arXiv:2402.15391).

    Where all columns see each other but for the layout, as with a masked head, frames and places are computed as
    batches of short sequences, which costs far less than a mask.
    """

    rules = 2

    def near(self, rule: int, query: Tensor, key: Tensor) -> Tensor:
        if rule == 0:
            return query[..., 0] == key[..., 0]
        same = (query[..., 1] == key[..., 1]) & (query[..., 2] == key[..., 2])
        return same & (key[..., 0] <= query[..., 0])

    def views(self, query: Tensor, key: Tensor, prefix: int, backend: str) -> list[View]:
        off = int((key[:, 0] < 0).sum())
        grid = key[off:]
        frames = int(grid[-1, 0]) + 1 if len(grid) else 0
        whole = prefix == len(key) and frames > 0 and len(grid) % frames == 0 and torch.equal(query, key)
        if not whole or not _is_raster(grid, frames):
            return super().views(query, key, prefix, backend)

        def within_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _batches(q, k, v, off, frames, False, backend)

        def along_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _batches(q, k, v, off, frames, True, backend)

        return [within_frames, along_time]


def _is_raster(grid: Tensor, frames: int) -> bool:
    """Whether places are those of whole frames in order, the same places in each."""
    each = grid.unflatten(0, (frames, -1))
    times = torch.arange(frames, device=grid.device)[:, None]
    return bool((each[..., 0] == times).all() and (each[..., 1:] == each[:1, :, 1:]).all())


def _batches(q: Tensor, k: Tensor, v: Tensor, off: int, frames: int, along_time: bool, backend: str) -> Tensor:
    """Attention within each frame, or causal along the times of each place, beside the columns off the grid."""

    def parts(x: Tensor) -> Tensor:  # (B, heads, off + T S, D) to (B, T or S, heads, S or T, D)
        x = x[:, :, off:].unflatten(2, (frames, -1))
        return x.permute(0, 3, 1, 2, 4) if along_time else x.transpose(1, 2)

    queries = parts(q)
    batch, count, _, length, _ = queries.shape
    keys, values = (
        torch.cat([x[:, None, :, :off].expand(-1, count, -1, -1, -1), parts(x)], 3).flatten(0, 1) for x in (k, v)
    )
    prefix = off if along_time else off + length
    y = attention(queries.flatten(0, 1), keys, values, prefix, backend).unflatten(0, (batch, count))
    y = (y.permute(0, 2, 3, 1, 4) if along_time else y.transpose(1, 2)).flatten(2, 3)
    if not off:
        return y
    return torch.cat([attention(q[:, :, :off], k[:, :, :off], v[:, :, :off], off, backend), y], 2)


@dataclass(frozen=True)
class DualChannel(Layout):
    """Two attentions a block: one within frames, that of an image model, and one that looks back in time (CogVideo,
    arXiv:2205.15868, section 3.2).

    window: how many earlier frames the second sees, at all places; it does not see its own frame.
    """

    window: int = 4
    rules = 2
    channels = 2

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is 1 frame or more; got {self.window}")

    def near(self, rule: int, query: Tensor, key: Tensor) -> Tensor:
        back = query[..., 0] - key[..., 0]
        return back == 0 if rule == 0 else (back >= 1) & (back <= self.window)
