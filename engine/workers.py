"""Codecs timed here or in a process of their own, one request and one answer a line.

A request is a JSON object: `{"do": "build", ...}` first, then `{"do": "seconds", ...}` or `{"do": "memory", ...}`; the
answer holds what was asked for or, under "error", why not.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from reelm.engine import store
from reelm.engine.errors import first_line
from reelm.engine.peers import PEERS, Codec, matched, ours

Shape = tuple[int, int, int]  # frames, height, width
WORK = ("encode", "decode")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # the latter by autocast


class Timed:
    """A codec of this process."""

    def __init__(self, codec: Codec, threads: int = 1) -> None:
        self.codec, self.parameters = codec, codec.parameters
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.made: dict[tuple[Shape, str], tuple[Tensor, Any]] = {}

    @torch.inference_mode()
    def work(self, what: str, shape: Shape, dtype: str = "float32") -> None:
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            if (shape, dtype) not in self.made:
                video = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
                self.made[shape, dtype] = video, self.codec.encode(video)
            video, codes = self.made[shape, dtype]
            result = self.codec.encode(video) if what == "encode" else self.codec.decode(codes)
        if what == "decode" and result.shape != video.shape:
            raise ValueError(f"a clip of {tuple(video.shape)} was decoded as one of {tuple(result.shape)}")

    def seconds(self, what: str, shape: Shape, dtype: str = "float32") -> float:
        start = self.clock()
        self.work(what, shape, dtype)
        return self.clock() - start

    def memory(self, shape: Shape) -> dict[str, int]:
        """Bytes of the weights and of what encoding and decoding hold at most beside them, in float32; Linux only."""
        weights, peaks = 4 * self.parameters, {}
        self.made.clear()
        for what in WORK:
            ctypes.CDLL(None).malloc_trim(0)
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
            self.work(what, shape)
            peaks[what] = memory("VmHWM") - before + weights
        return peaks


def memory(which: str) -> int:
    """Bytes of this process: resident now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


class Worker:
    """A codec of another process, which speaks the protocol above; the methods are those of `Timed`.

    Raises RuntimeError, in one line, where the other process says that it cannot, or ends.
    """

    def __init__(self, command: list[str], path: Path | None = None, **build: Any) -> None:
        """command: starts the process. path: a folder that it, alone, finds packages in. build: what it builds."""
        known = [str(path), os.environ.get("PYTHONPATH", "")] if path else [os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known))},
        )  # fmt: skip
        try:
            self.parameters = int(self.ask("build", **build)["parameters"])
        except RuntimeError:
            self.close()
            raise

    def ask(self, do: str, **about: Any) -> dict[str, Any]:
        try:
            print(json.dumps({"do": do, **about}), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            raise RuntimeError(f"its process ended with status {self.process.wait()}") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def seconds(self, what: str, shape: Shape, dtype: str = "float32") -> float:
        return self.ask("seconds", what=what, shape=shape, dtype=dtype)["seconds"]

    def memory(self, shape: Shape) -> dict[str, int]:
        return self.ask("memory", shape=shape)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


SERVE = [sys.executable, "-c", "from reelm.engine.workers import main; main()"]


def build(peer: str | None, parameters: int, model: dict[str, Any] | None, threads: int) -> Timed:
    """A peer as large as `parameters`, or the model of a description."""
    torch.set_num_threads(threads)
    return Timed(matched(PEERS[peer].build, parameters) if peer else ours(store.build(model).eval()), threads)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers requests until there are no more."""
    timed: Timed | None = None
    for line in requests:
        request = json.loads(line)
        do = request.pop("do")
        if "shape" in request:
            request["shape"] = tuple(request["shape"])
        try:
            if do == "build":
                timed = build(**request)
                answer = {"parameters": timed.parameters}
            elif do == "seconds":
                answer = {"seconds": timed.seconds(**request)}
            else:
                answer = timed.memory(**request)
        except Exception as error:  # whatever it is, it is the other process that tells the user
            answer = {"error": f"{type(error).__name__}: {first_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin, answers)
