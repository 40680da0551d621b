"""The tokens of a generation that was interrupted, in a file that it goes on from."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelm.data.writing import whole_file


class Account:
    """The tokens of one call in the order of making, those that an interrupted call left first.

    made: the ids `(B, k)` of each pass. total: how many are asked for. progress: called with how many are made.
    """

    def __init__(self, made: list[Tensor] | None, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.made = [] if made is None else made
        self.before = torch.cat(self.made, 1) if self.made else None
        self.total, self.count, self.progress = total, 0, progress

    def begin(self, steps: int, device: torch.device) -> Tensor | None:
        """Those of the next `steps` that were made before."""
        left = None if self.before is None else self.before[:, self.count : self.count + steps].to(device)
        return left if left is not None and left.shape[1] else None

    def add(self, ids: Tensor) -> None:
        self.count += ids.shape[1]
        if self.before is None or self.count > self.before.shape[1]:
            self.made.append(ids)
        if self.progress is not None:
            self.progress(self.count, self.total)


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


def keep_tokens(path: Path, made: list[list[Tensor]], settings: dict[str, Any], dtype: str) -> None:
    """Writes the ids `(B, n)` of each window, the settings that they depend on, and the format of the products; prints
    the command that goes on. Nothing where no token was made."""
    windows = [torch.cat(pieces, 1).cpu().contiguous() for pieces in made if pieces]
    if not windows:
        return
    notes = {"reelm": json.dumps({"settings": settings, "dtype": dtype})}
    with whole_file(path) as part:
        save_file({f"{i:06d}": ids for i, ids in enumerate(windows)}, part, notes)
    words = [word for word in sys.argv if not word.startswith("tokens=")]
    print(f"{sum(ids.shape[1] for ids in windows)} tokens of each clip are kept; go on with", file=sys.stderr)
    print(shlex.join(["python", *words, f"tokens={path}"]), file=sys.stderr)


def read_tokens(path: Path, settings: dict[str, Any]) -> tuple[str, list[list[Tensor]]]:
    """The format of the products, and the tokens of each window. ValueError where other settings made them."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; tokens=... is what an interrupted call named")
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["reelm"])
            made = [[file.get_tensor(name)] for name in sorted(file.keys())]
        before, dtype = notes["settings"], notes["dtype"]
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of tokens: {' '.join(str(error).split())}") from None
    settings = json.loads(json.dumps(settings))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(f"tokens={path} were made with {name} {before.get(name)}, not {value}; give the same")
    return dtype, made
