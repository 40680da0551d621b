"""How much memory a tokenizer needs for frames of a size."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelm.tokenizers.tokenizer import VideoTokenizer

SPARE = 1.5  # what operations need for themselves, as a factor on what tensors take; measured up to 1.35
PROBE = 8  # latents a side
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out: a GPU's, or the machine's, for which torch has no class."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in said or "allocate memory" in said)


def bytes_of(memory: int | str) -> int:
    """An amount of memory such as 2_000_000_000, "500MB" or "2 GiB" in bytes; ValueError for what is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(memory).upper())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"memory={memory} is no amount of memory; give bytes, or a number with MB or GB")
    return int(float(found[1]) * UNITS[found[2] or ""])


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and live at once: `most`, whatever device they are on.

    Those of `there` before are not counted, nor what an operation needs for itself on the way.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._there = [tensor.untyped_storage() for tensor in there]
        self._known = {id(storage) for storage in self._there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known:
                    self._known.add(id(storage))
                    self.now += storage.nbytes()
                    finalize(storage, self._gone, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@torch.no_grad()
def bytes_per_pixel(tokenizer: VideoTokenizer, frames: int) -> float:
    """About how many bytes a pixel of `frames` frames takes while they are encoded or decoded, the weights aside.

    Counted while a small clip goes through the network; what attention within frames takes grows faster than that.
    """
    height, width = (PROBE * side for side in tokenizer.compression[1:])
    video = torch.zeros(1, 3, frames, height, width, device=tokenizer.device)
    with PeakMemory([*tokenizer.parameters(), *tokenizer.buffers()]) as peak:
        latents = tokenizer.encode_latents(video)
    most = peak.most
    quantized = tokenizer.quantizer.lookup(tokenizer.quantizer(latents)[1])
    with PeakMemory([*tokenizer.parameters(), *tokenizer.buffers()]) as peak:
        tokenizer.decode_latents(quantized)
    return SPARE * (max(most, peak.most) + video.nbytes) / (height * width)
