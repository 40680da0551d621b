"""Clips as tokens in shards: each a safetensors file that can tell whether it is whole, with one index over all.

A shard holds `ids` `(N, t, h, w)` in the smallest unsigned type that holds the vocabulary or, of a tokenizer without
one, latents `(N, t, h, w, D)` in half precision under the same name; `captions` and `keys` as UTF-8 bytes one after the
other, with where each ends; and `notes`: the settings that made it and what was left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import Dataset

from reelm.data.clip import Clip
from reelm.data.writing import whole_file

INDEX = "index.json"
TENSORS = ("ids", "captions", "captions_end", "keys", "keys_end")
NOTES = "reelm"  # one entry: safetensors writes several in random order, and equal shards must be equal files


def shard_name(number: int) -> str:
    return f"{number:06d}.safetensors"


def _joined(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all texts and where each ends."""
    rows = [text.encode("utf-8", "surrogatepass") for text in texts]  # names of files need not be valid Unicode
    return np.frombuffer(b"".join(rows), np.uint8), np.cumsum([len(row) for row in rows], dtype=np.int64)


def _digest(notes: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(notes, sort_keys=True).encode(), digest_size=16)
    for name in TENSORS:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()


def write_shard(path: Path, ids: np.ndarray, captions: Sequence[str], keys: Sequence[str], notes: dict) -> None:
    """Writes one shard; the same arguments make the same bytes. Raises OSError where it cannot be written.

    ids: `(N, t, h, w)` unsigned, or `(N, t, h, w, D)` float16. notes: what JSON can hold.
    """
    tensors = {"ids": ids}
    for name, texts in (("captions", captions), ("keys", keys)):
        tensors[name], tensors[f"{name}_end"] = _joined(texts)
    text = json.dumps({**notes, "digest": _digest(notes, tensors)}, sort_keys=True)
    with whole_file(path) as part:
        part.write_bytes(save(tensors, metadata={NOTES: text}))  # `save_file` would let nobody else read it


class Shard:
    """One shard, mapped into memory: rows are read where they stand.

    notes: as they were given to `write_shard`. Raises ValueError for what is no whole shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="np")
            self.notes = json.loads(self._file.metadata()[NOTES])
            self._said = self.notes.pop("digest")
            self._slices = {name: self._file.get_slice(name) for name in TENSORS}
            self.shape = tuple(self._slices["ids"].get_shape())
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._damaged() from error

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is missing or damaged; the scripts/encode.py command that made it remakes it")

    def __len__(self) -> int:
        return self.shape[0]

    def verify(self) -> None:
        """Reads all of it; ValueError where anything is not as it was written."""
        if _digest(self.notes, {name: self._file.get_tensor(name) for name in TENSORS}) != self._said:
            raise self._damaged()

    def tokens(self, row: int, frames: int, vocabulary: int | None) -> np.ndarray:
        """The first `frames` latent frames of a row: ids `(1, frames, h, w)` int64 or, where there is no vocabulary,
        latents `(1, frames, h, w, D)` float32. ValueError where they are none."""
        stored = self._slices["ids"][row : row + 1, :frames]
        if vocabulary is None:
            if stored.dtype != np.float16 or not np.isfinite(stored).all():
                raise self._damaged()
            return stored.astype(np.float32)
        if stored.dtype.kind != "u" or stored.max() >= vocabulary:
            raise self._damaged()
        return stored.astype(np.int64)

    def text(self, name: str, row: int) -> str:
        """The caption or key of a row; name: "captions" or "keys"."""
        ends = self._slices[f"{name}_end"][max(row - 1, 0) : row + 1].tolist()
        start, end = ends[0] if row else 0, ends[-1]
        if start == end:  # where all texts are empty nothing can be sliced
            return ""
        return self._slices[name][start:end].tobytes().decode("utf-8", "surrogatepass")


class TokenShards(Dataset[Clip]):
    """Clips whose tokens `scripts/encode.py` has stored, without pixels, sound or controls.

    root: its output. split: "train" or "validation".

    tokenizer: the fingerprint of the one that made the tokens. Raises FileNotFoundError or ValueError where the tokens
    are not all there.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        self.folder = Path(root) / split
        try:
            index = json.loads((self.folder / INDEX).read_text())
            settings, shards = index["settings"], index["shards"]
            self.tokenizer, self.vocabulary = settings["tokenizer"], settings["vocabulary"]
            self.frames, self.size, self.fps = settings["frames"], tuple(settings["size"]), settings["fps"]
            self.step = settings["compression"][0]
            self.paths = [self.folder / shard["file"] for shard in shards]
            self.ends = np.cumsum([shard["clips"] for shard in shards])
            sizes = [shard["bytes"] for shard in shards]
        except OSError:
            raise FileNotFoundError(
                f"{self.folder} holds no finished tokens ({INDEX} is missing); scripts/encode.py makes them and goes "
                "on where it was stopped"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.folder / INDEX} is damaged; the scripts/encode.py command remakes it") from None
        for path, size in zip(self.paths, sizes):
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} is missing or damaged; the scripts/encode.py command that made it remakes it")
        self._shards: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # each process opens its own

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Clip:
        return self.get(index)

    def _place(self, index: int) -> tuple[Shard, int]:
        """The shard that holds a clip, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has the clips 0 to {len(self) - 1}; got {index}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        if number not in self._shards:
            shard = Shard(self.paths[number])
            shard.verify()
            if shard.notes["settings"]["tokenizer"] != self.tokenizer:
                raise ValueError(
                    f"{shard.path} holds tokens of another tokenizer than its {INDEX} says; delete it, and the "
                    "scripts/encode.py command that made the others remakes it"
                )
            self._shards[number] = shard
        return self._shards[number], index - int(self.ends[number - 1] if number else 0)

    def caption(self, index: int, frames: int | None = None) -> str:
        shard, row = self._place(index)
        return shard.text("captions", row)

    def get(self, index: int, frames: int | None = None, controls: Sequence[str] | None = None, draw: int = 0) -> Clip:
        """A batch of one with `tokens`; `frames` may be fewer than were stored, as the tokenizer is causal.

        draw: of no effect; what was left to chance was drawn when the tokens were made. Raises ValueError for controls
        and for frames that are not there.
        """
        frames = frames or self.frames
        if controls:
            raise ValueError(f"{self.folder} holds tokens alone, no {' and '.join(controls)}")
        if frames > self.frames or (frames - 1) % self.step:
            raise ValueError(
                f"{self.folder} holds the tokens of {self.frames} frames; 1 + {self.step}k of them can be read, "
                f"not {frames}"
            )
        shard, row = self._place(index)
        tokens = shard.tokens(row, 1 + (frames - 1) // self.step, self.vocabulary)
        return Clip(
            torch.empty(1, 3, frames, *self.size, device="meta"),
            fps=self.fps,
            captions=(shard.text("captions", row),),
            keys=(shard.text("keys", row),),
            tokens=torch.from_numpy(tokens),
        )
