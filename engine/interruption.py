"""The tokens of a generation that was interrupted, in a file that it goes on from."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reelm.data.writing import whole_file

NONE = float("nan")


class Account:
    """The tokens of one call in the order of making, those that an interrupted call left first.

    made: ids `(B, k)` or latents `(B, k, D)` of each pass; -1 or NaN in the rows of samples that it made none of.
    batch: B. total: tokens asked for, of all samples together. progress: called with how many tokens of a clip are
    made and asked for, on average.
    """

    def __init__(
        self, made: list[Tensor] | None, batch: int, total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.made = [] if made is None else made
        self.before = torch.cat(self.made, 1) if self.made else None
        if self.before is not None and len(self.before) != batch:
            raise ValueError(f"tokens of {len(self.before)} clips were made before, {batch} are asked for")
        self.batch, self.total, self.count, self.progress = batch, total, 0, progress

    def of(self, rows: list[int]) -> Share:
        return Share(self, rows)

    def keep(self, rows: list[int], tokens: Tensor) -> None:
        if len(rows) < self.batch:
            whole = tokens.new_full((self.batch, *tokens.shape[1:]), NONE if tokens.is_floating_point() else -1)
            whole[rows] = tokens
            tokens = whole
        self.made.append(tokens)

    def tell(self, more: int) -> None:
        self.count += more
        if self.progress is not None and more:
            self.progress(self.count // self.batch, self.total // self.batch)


class Share:
    """The account of those samples of a call that are made together."""

    def __init__(self, account: Account, rows: list[int]) -> None:
        self.account, self.rows, self.count, self.told, self.before = account, rows, 0, 0, None
        if account.before is not None:
            mine = account.before[rows]
            first = mine[0].flatten(1)[:, 0] if mine.is_floating_point() else mine[0]
            self.before = mine[:, ~first.isnan() if mine.is_floating_point() else first >= 0]

    def begin(self, steps: int, device: torch.device) -> Tensor | None:
        """Those of the next `steps` that were made before."""
        left = None if self.before is None else self.before[:, self.count : self.count + steps].to(device)
        return left if left is not None and left.shape[1] else None

    def add(self, tokens: Tensor) -> None:
        """Takes the tokens `(b, k)` or `(b, k, D)` of a pass."""
        self.count += tokens.shape[1]
        if self.before is None or self.count > self.before.shape[1]:
            self.account.keep(self.rows, tokens)
        self.tell(self.count)

    def tell(self, count: int) -> None:
        """Says how many tokens of each sample are made."""
        more, self.told = (count - self.told) * len(self.rows), count
        self.account.tell(more)


class Windows:
    """The tokens of the windows that a job makes one after the other, those of an interrupted call first.

    made: a list for each window, of pieces `(B, k)`; it grows with the windows. None: nobody wants them.
    """

    def __init__(self, made: list[list[Tensor]] | None) -> None:
        self.made, self.number = made, 0

    def next(self) -> dict[str, list[Tensor]]:
        """What the next window is told: the list that it fills and goes on from."""
        if self.made is None:
            return {}
        if self.number == len(self.made):
            self.made.append([])
        self.number += 1
        return {"made": self.made[self.number - 1]}


def _written(content: bytes, place: Path, *others: Path) -> Path:
    """The first of these places that can be written, with the content; OSError where none can."""
    try:
        with whole_file(place) as part:
            part.write_bytes(content)
        return place
    except OSError:
        if not others:
            raise
        return _written(content, *others)


def keep_tokens(path: Path, made: list[list[Tensor]], settings: dict[str, Any], dtype: str) -> None:
    """Writes the tokens `(B, n)` of each window, the settings that they depend on, and the format of the products;
    prints the command that goes on. Where no token was made, or nothing can be written, it says so.

    Where the path cannot be written, it is a file of that name in the folder for temporary files.
    """
    windows = {f"{i:06d}": torch.cat(pieces, 1).cpu().contiguous() for i, pieces in enumerate(made) if pieces}
    if not windows:
        print("no tokens to be kept are made yet; the same command begins anew", file=sys.stderr)
        return
    notes = {"reelm": json.dumps({"settings": settings, "dtype": dtype})}
    content = save(windows, notes)  # `save_file` would let nobody else read it, and has errors of its own
    try:
        path = _written(content, path, Path(tempfile.gettempdir()) / path.name)
    except OSError as error:
        print(f"the tokens made so far are lost: {error}", file=sys.stderr)
        return
    words = [word for word in sys.argv if not word.startswith("tokens=")]
    print(f"{sum(ids.shape[1] for ids in windows.values())} tokens of each clip are kept; go on with", file=sys.stderr)
    print(shlex.join(["python", *words, f"tokens={path}"]), file=sys.stderr)


def read_tokens(path: Path, settings: dict[str, Any]) -> tuple[str, list[list[Tensor]]]:
    """The format of the products, and the tokens of each window. ValueError where other settings made them."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; tokens=... is what an interrupted call named")
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["reelm"])
            kept = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            made = [[kept[i]] if i in kept else [] for i in range(max(kept) + 1)]
        before, dtype = notes["settings"], notes["dtype"]
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of tokens: {' '.join(str(error).split())}") from None
    settings = json.loads(json.dumps(settings))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(f"tokens={path} were made with {name} {before.get(name)}, not {value}; give the same")
    return dtype, made
