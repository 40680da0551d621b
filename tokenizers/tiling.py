"""Frames of any size and clips of any length through any video tokenizer: padding, and tiles that bound the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reelm.tokenizers.memory import bytes_of, bytes_per_pixel, out_of_memory
from reelm.tokenizers.streaming import recut
from reelm.tokenizers.tokenizer import Triple, VideoTokenizer

Pair = tuple[int, int]


def padded(video: Tensor, compression: Triple) -> Tensor:
    """`(B, 3, T, H, W)` of any size as one that fits the compression: the last frame, row and column are repeated.

    What is decoded again is cut by `[:, :, :T, :H, :W]`.
    """
    frames, height, width = video.shape[2:]
    more = (-(frames - 1) % compression[0], -height % compression[1], -width % compression[2])
    return F.pad(video, (0, more[2], 0, more[1], 0, more[0]), mode="replicate") if any(more) else video


@dataclass(frozen=True)
class Tiles:
    """Where tiles of one size stand in a frame, in latents: evenly, and with the frame's edges at theirs."""

    size: Pair
    starts: tuple[tuple[int, ...], tuple[int, ...]]  # of rows and of columns

    @classmethod
    def over(cls, grid: Pair, most: Pair, overlaps: Pair) -> Tiles:
        """Tiles of at most `most` latents whose neighbours share at least `overlaps`."""
        sizes, starts = [], []
        for length, tile, overlap in zip(grid, most, overlaps, strict=True):
            count = 1 if tile >= length else -(-(length - overlap) // (tile - overlap))
            size = -(-(length - overlap) // count) + overlap  # no larger than so many need
            starts.append(tuple(round(i * (length - size) / max(count - 1, 1)) for i in range(count)))
            sizes.append(size)
        return cls(tuple(sizes), tuple(starts))

    def __iter__(self) -> Iterator[Pair]:
        """Row and column at which each tile starts."""
        return iter([(row, column) for row in self.starts[0] for column in self.starts[1]])

    def own(self, axis: int, start: int) -> Pair:
        """First and last + 1 latent of the part of a tile that no other tile has: overlaps are cut in the middle."""
        starts, size = self.starts[axis], self.size[axis]
        i = starts.index(start)
        first = start if i == 0 else (start + starts[i - 1] + size) // 2
        last = start + size if i == len(starts) - 1 else (starts[i + 1] + start + size) // 2
        return first, last

    def weights(self, axis: int, start: int, stretch: int) -> Tensor:
        """Share of a tile in each of its pixels `(size * stretch,)`; those of all tiles add up to one.

        Straight ramps run over the middle third of the overlaps: what is nearer to a tile's edge lacks too much of
        what is beyond it.
        """
        starts, size = self.starts[axis], self.size[axis] * stretch
        places, ramps = torch.arange(starts[-1] * stretch + size) + 0.5, {}
        for i, first in enumerate(starts):
            inside = places - first * stretch
            ramps[first] = ((inside > 0) & (inside < size)).float()
            for neighbour, inwards in ((i - 1, inside), (i + 1, size - inside)):
                if 0 <= neighbour < len(starts):
                    overlap = size - abs(starts[neighbour] - first) * stretch
                    ramps[first] *= (3 * inwards / overlap - 1).clamp(0, 1) if overlap else 1
        share = ramps[start] / sum(ramps.values())
        return share[start * stretch : start * stretch + size]


class Tiled(VideoTokenizer):
    """A tokenizer that takes large frames tile by tile, and long clips piece by piece.

    Tiles overlap. Of encoded tiles the part away from the seams is kept; decoded ones are blended by straight ramps.
    The tokens are those of the whole frame where the overlap holds what the encoder sees to both sides
    (`VideoTokenizer.reach`) and nothing in it looks at the whole frame; with norms over frames or attention within
    them they are nearly so, and pixels too. A frame that needs one tile only is as without tiles, to the last bit.

    A whole clip is worked on tile after tile, each through time, so that only one tile's past is held. A stream needs
    the past of all its tiles. Where memory runs out nonetheless, tiles become smaller.

    Args:
        tokenizer: that does the work.
        tile: largest height and width of a tile in pixels, overlaps included; None: as `memory` allows.
        memory: bytes, or a text such as "2GB", that the work on a tile may take beside the weights and the clip itself.
            With neither, frames are one tile.
        overlap: pixels that neighbours share; None: what the network sees to both sides, and at most half a tile.
        latent_frames: of a whole clip, how many are worked on at once, where the tokenizer takes streams.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        tile: Pair | None = None,
        memory: int | str | None = None,
        overlap: int | None = None,
        latent_frames: int = 4,
    ) -> None:
        super().__init__()
        self.tokenizer, self.tile, self.memory, self.overlap = tokenizer, tile, memory, overlap
        self.latent_frames, self.streams = latent_frames, tokenizer.streams
        self.quantizer, self.compression = tokenizer.quantizer, tokenizer.compression
        if latent_frames < 1 or (overlap or 0) < 0 or (tile and (len(tile) != 2 or min(tile) < 1)):
            raise ValueError(f"tile={tile}, overlap={overlap} and latent_frames={latent_frames} are no sizes")
        self._budget = None if memory is None else bytes_of(memory)
        self._chosen: dict[tuple[int, int, int], Pair] = {}  # by batch and grid: tiles in latents
        self.used = 0  # tiles that the last frame took

    def reach(self) -> tuple[Pair, Pair] | None:
        return self.tokenizer.reach()

    def encode_latents(self, video: Tensor, past: dict | None = None) -> Tensor:
        self.check(video, past)
        begun, (step, *sides) = bool(past), self.compression
        frames = (video.shape[2] - 1) // step + 1  # of a later piece too, which has no frame of its own in front
        out = torch.empty(0)

        def put(tiles: Tiles, place: Pair, frame: int, made: Tensor) -> None:
            nonlocal out
            if place == (0, 0) and frame == 0:
                out = made.new_empty(*made.shape[:2], frames, *grid)
            (top, bottom), (left, right) = (tiles.own(axis, place[axis]) for axis in (0, 1))
            kept = made[..., top - place[0] : bottom - place[0], left - place[1] : right - place[1]]
            out[:, :, frame : frame + made.shape[2], top:bottom, left:right] = kept

        grid = (video.shape[3] // sides[0], video.shape[4] // sides[1])
        first = 0 if begun else 1 - step
        sizes = (self.latent_frames * step + first, self.latent_frames * step)
        self._run(self.tokenizer.encode_latents, video, tuple(sides), sizes, 0, grid, past, put)
        return out

    def decode_latents(self, latents: Tensor, past: dict | None = None) -> Tensor:
        step, *sides = self.compression
        grid = tuple(latents.shape[3:])
        frames = latents.shape[2] * step - (0 if past else step - 1)
        out = torch.empty(0)

        def put(tiles: Tiles, place: Pair, frame: int, made: Tensor) -> None:
            nonlocal out
            if place == (0, 0) and frame == 0:  # also where a trial with larger tiles has failed
                out = made.new_zeros(len(made), 3, frames, grid[0] * sides[0], grid[1] * sides[1])
            rows, columns = (tiles.weights(axis, place[axis], sides[axis]).to(made) for axis in (0, 1))
            top, left = place[0] * sides[0], place[1] * sides[1]
            where = out[:, :, frame : frame + made.shape[2], top : top + len(rows), left : left + len(columns)]
            where.addcmul_(made, rows[:, None] * columns)

        sizes = (self.latent_frames, self.latent_frames)
        self._run(self.tokenizer.decode_latents, latents, (1, 1), sizes, 1, grid, past, put)
        return out

    def _run(
        self,
        work: Callable[[Tensor, dict | None], Tensor],
        whole: Tensor,
        stretch: Pair,
        sizes: Pair,
        side: int,
        grid: Pair,
        past: dict | None,
        put: Callable[[Tiles, Pair, int, Tensor], None],
    ) -> None:
        """Gives `put` what `work` makes of each tile and piece, with the tile's place and its first frame.

        stretch: rows and columns of `whole` in a latent. sizes: frames of its first and of later pieces. side: 0 where
        it encodes, 1 where it decodes.
        """
        apart = past is None and self.streams
        while True:
            tiles = past[self] if past else self._tiles(len(whole), grid, side)
            begun = bool(past)
            if past is not None:
                past[self] = tiles
            try:
                for row, column in tiles:
                    part = whole[..., row * stretch[0] : (row + tiles.size[0]) * stretch[0],
                                 column * stretch[1] : (column + tiles.size[1]) * stretch[1]]  # fmt: skip
                    own = {} if apart else None if past is None else past.setdefault((row, column), {})
                    frame = 0
                    for piece in recut([part], *sizes) if apart else [part]:
                        made = work(piece.to(self.tokenizer.device), own)
                        put(tiles, (row, column), frame, made)
                        frame += made.shape[2]
                        del made
                self.used = len(list(tiles))
                return
            except Exception as error:
                if not out_of_memory(error) or begun or tiles.size == (1, 1):
                    raise
            if past is not None:
                past.clear()
            torch.cuda.empty_cache()
            self._chosen[len(whole), *grid] = _smaller(tiles.size)

    def _tiles(self, batch: int, grid: Pair, side: int) -> Tiles:
        """The tiles of a frame that encoding (side 0) or decoding (1) takes."""
        key = (batch, *grid)
        if key not in self._chosen:
            self._chosen[key] = self._largest(batch, grid)
        most = self._chosen[key]
        return Tiles.over(grid, most, tuple(self._overlap(axis, most[axis], side) for axis in (0, 1)))

    def _largest(self, batch: int, grid: Pair) -> Pair:
        sides = self.compression[1:]
        tile = grid
        if self.tile:
            tile = tuple(min(-(-want // part), length) for want, part, length in zip(self.tile, sides, grid))
        if self._budget is None:
            return tile
        frames = 1 + self.latent_frames * self.compression[0]
        pixel = batch * bytes_per_pixel(self.tokenizer, frames)
        while pixel * tile[0] * sides[0] * tile[1] * sides[1] > self._budget:
            if max(tile) <= 2:
                raise ValueError(
                    f"memory={self.memory} is too little: {frames} frames of {tile[0] * sides[0]} x "
                    f"{tile[1] * sides[1]} alone take {pixel * tile[0] * sides[0] * tile[1] * sides[1] / 1e6:.1f} MB"
                )
            tile = _smaller(tile)
        return tile

    def _overlap(self, axis: int, tile: int, side: int) -> int:
        """Latents that neighbours share."""
        if self.overlap is not None:
            return min(-(-self.overlap // self.compression[1 + axis]), tile - 1)
        reach = self.reach()
        return tile // 2 if reach is None else min(2 * reach[side][axis], tile // 2)


def _smaller(tile: Pair) -> Pair:
    """About three quarters of the longer side."""
    rows, columns = tile
    return (rows, max(3 * columns // 4, 1)) if columns >= rows else (max(3 * rows // 4, 1), columns)
