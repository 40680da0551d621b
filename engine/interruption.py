"""The tokens of a generation that was interrupted, in a file that it goes on from."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reelm.data.writing import whole_file


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
