"""Tokens of a whole data source, in shards: what a training that reads them need not decode and encode again.

A shard is a pure function of the source, the tokenizer and its number: it holds a fixed range of the source's clips,
in their order, without those that cannot be read. So it does not matter who makes it or when: whole shards are left as
they are, missing and damaged ones are made, and a run that was killed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from reelm.data.clip import Clip
from reelm.data.reading import VideoError
from reelm.data.tokens import INDEX, Shard, TokenShards, shard_name, write_shard
from reelm.data.writing import whole_file, writing
from reelm.engine import store
from reelm.engine.torchscript import TorchScript
from reelm.tokenizers.tokenizer import VideoTokenizer, in_half_precision

BACKENDS = ("local", "ray")


class Source(Protocol):
    """A data source whose clips can be told apart: `data.folder.Videos` and Zoetrope are."""

    frames: int
    size: int | tuple[int, int]
    fps: float

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The name of a clip, without reading it."""

    def read(self, index: int, frames: int | None = None, controls: Sequence[str] | None = None, draw: int = 0) -> Clip:
        """Exactly this clip; VideoError where it cannot be read."""


@dataclass(frozen=True)
class Failure:
    """A clip that is left out."""

    key: str
    reason: str


class Reads(Dataset):
    """Clips of a source by their number over all passes, or why they cannot be read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, number: int) -> Clip | Failure:
        draw, index = divmod(number, len(self.source))
        try:
            clip = self.source.read(index, controls=(), draw=draw)
        except VideoError as error:
            return Failure(self.source.key(index), str(error))
        return clip.replace(audio=None, audio_rate=None)


@dataclass(frozen=True)
class Encoding:
    """What is made of one split of a data source.

    source: of the clips. tokenizer: of video, frozen. folder: of the shards.
    about: what else the clips depend on, as JSON: the source's configuration.
    shard_clips: clips of the source a shard. batch_size: clips encoded at once. passes: over the source, each another
    draw of what it leaves to chance.
    """

    source: Source
    tokenizer: VideoTokenizer
    folder: Path
    about: dict[str, Any]
    shard_clips: int = 512
    batch_size: int = 16
    passes: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.source, TokenShards):
            raise ValueError("data=tokens is what this makes; name the clips themselves, such as data=folder")
        for name in ("shard_clips", "batch_size", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the bytes of a shard depend on; ValueError where the clips do not fit the tokenizer."""
        source, size = self.source, self.source.size
        size = [size, size] if isinstance(size, int) else list(size)
        self.tokenizer.grid(source.frames, *size)
        names = hashlib.blake2b(digest_size=16)
        for index in range(len(source)):
            names.update(json.dumps(source.key(index)).encode())
        return {
            "tokenizer": store.fingerprint(self.tokenizer),
            "vocabulary": self.tokenizer.vocabulary,
            "compression": list(self.tokenizer.compression),
            "frames": source.frames,
            "size": size,
            "fps": source.fps,
            "shard_clips": self.shard_clips,
            "batch_size": self.batch_size,
            "passes": self.passes,
            "data": self.about,
            "names": names.hexdigest(),
        }

    @property
    def shards(self) -> int:
        return -(-len(self.source) * self.passes // self.shard_clips)

    def path(self, number: int) -> Path:
        return self.folder / shard_name(number)

    def batches(self, number: int) -> list[range]:
        """Clips of a shard as they are encoded together."""
        first = number * self.shard_clips
        last = min(first + self.shard_clips, len(self.source) * self.passes)
        return [range(i, min(i + self.batch_size, last)) for i in range(first, last, self.batch_size)]

    def make(self, number: int, reads: Iterable[Sequence[Clip | Failure]]) -> None:
        """Encodes what was read of each of the shard's batches and writes the shard."""
        device = self.tokenizer.device
        grid = self.tokenizer.grid(self.source.frames, *self.settings["size"])
        vocabulary = self.tokenizer.vocabulary
        if vocabulary is None:
            tokens = [np.empty((0, *grid, self.tokenizer.quantizer.dim), np.float16)]
        else:
            tokens = [np.empty((0, *grid), np.min_scalar_type(vocabulary - 1))]
        captions: list[str] = []
        keys: list[str] = []
        failures: list[tuple[str, str]] = []
        for batch in reads:
            failures += [(read.key, read.reason) for read in batch if isinstance(read, Failure)]
            clips = [read for read in batch if isinstance(read, Clip)]
            if clips:
                clip = Clip.stack(clips)
                made = self.tokenizer.encode(clip.video.to(device))
                made = in_half_precision(made) if vocabulary is None else made
                tokens.append(made.cpu().numpy().astype(tokens[0].dtype))
                captions += clip.captions
                keys += clip.keys
        notes = {"settings": self.settings, "shard": number, "failures": failures}
        write_shard(self.path(number), np.concatenate(tokens), captions, keys, notes)

    def present(self) -> dict[int, Shard]:
        """The whole shards that are there, by number; ValueError where the folder holds tokens of something else."""
        here, shards = _flat(json.loads(json.dumps(self.settings))), {}
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):
            try:
                shard = Shard(path)
                shard.verify()
            except ValueError:
                print(f"{path} is damaged and made anew", file=sys.stderr)
                continue
            self._check(_flat(shard.notes["settings"]), here)
            shards[shard.notes["shard"]] = shard
        return {number: shard for number, shard in shards.items() if shard.path == self.path(number)}

    def _check(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        for name in here:
            if there.get(name) != here[name]:
                values = f"{there.get(name)}, this run's is {here[name]}"
                what = {
                    "tokenizer": f"tokens of another tokenizer ({values})",
                    "names": "tokens of other clips: files have come or gone since",
                }.get(name, f"tokens made with another {name} ({values})")
                raise ValueError(f"{self.folder} holds {what}; choose another output=... or delete it")

    def write_index(self, shards: dict[int, Shard]) -> dict[str, Any]:
        """Writes and returns what there is, and which clips were left out, each name once."""
        failures = [failure for number in sorted(shards) for failure in shards[number].notes["failures"]]
        index = {
            "settings": self.settings,
            "clips": sum(len(shard) for shard in shards.values()),
            "left_out": len(failures),
            "failures": dict(reversed(failures)),  # of several reasons the first
            "shards": [
                {"file": shard.path.name, "clips": len(shard), "bytes": shard.path.stat().st_size}
                for _, shard in sorted(shards.items())
            ],
        }
        with whole_file(self.folder / INDEX) as part:
            part.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        return index


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings and, as `data.name`, those of the source."""
    data = {f"data.{name}": value for name, value in settings.get("data", {}).items()}
    return {**{name: value for name, value in settings.items() if name != "data"}, **data}


def local(job: Encoding, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Makes shards, decoding in `workers` processes ahead of the encoder, and tells each as it is there."""
    batches = (batch for number in numbers for batch in job.batches(number))
    reads = iter(DataLoader(Reads(job.source), batch_sampler=batches, collate_fn=list, num_workers=workers))
    try:
        for number in numbers:
            job.make(number, itertools.islice(reads, len(job.batches(number))))
            yield number
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise OSError(f"a process that decodes has died ({str(error).splitlines()[0]}); all shards are whole: "
                      "the same command goes on, and with workers=0 shows where") from error  # fmt: skip


class RayWorker:
    """Makes shards in a process of Ray's."""

    def __init__(self, job: Encoding) -> None:
        self.job = job
        job.tokenizer.to(best_device())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number, reads = int(row["item"]), Reads(self.job.source)
        self.job.make(number, ([reads[i] for i in batch] for batch in self.job.batches(number)))
        return row


def with_ray(job: Encoding, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Makes shards on a Ray cluster whose machines see the clips and the output, each wholly in one process."""
    import ray.data

    gpus = {"num_gpus": 1} if torch.cuda.is_available() else {}
    rows = ray.data.from_items(list(numbers))
    made = rows.map(RayWorker, fn_constructor_args=(job,), concurrency=max(workers, 1), **gpus)
    for row in made.iter_rows():
        yield int(row["item"])


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """A SIGTERM unwinds the program, so that nothing half written stays, and ends it with status 143."""

    def stop(*_: Any) -> None:
        print("SIGTERM: all shards that are there are whole; the same command goes on", file=sys.stderr)
        sys.exit(143)

    previous = None
    with suppress(ValueError):  # not the main thread: somebody else looks after signals
        previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def encode(jobs: Sequence[Encoding], workers: int = 1, backend: str = "local") -> None:
    """Makes the shards that are missing and, when all are there, the index of each job.

    workers: processes that decode; with Ray, that decode and encode. backend: "local" or "ray".
    Raises ValueError for settings that cannot be, or that are not those of the tokens in a folder.
    """
    if backend not in BACKENDS or workers < 0:
        raise ValueError(f"backend={backend} is {' or '.join(BACKENDS)} and workers={workers} are 0 or more")
    if backend == "ray":
        try:
            import ray.data  # noqa: F401
        except ImportError:
            raise ValueError("backend=ray needs Ray Data, which is not there: pip install reelm[ray]") from None
        if any(isinstance(job.tokenizer, TorchScript) for job in jobs):
            raise ValueError("TorchScript programs cannot be sent to other processes, as Ray would; take backend=local")
    present = [job.present() for job in jobs]  # of all, before any is begun
    for job in jobs:
        with writing(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
    with ending_on_sigterm():
        for job, shards in zip(jobs, present, strict=True):
            _encode(job, shards, workers, backend)


def _encode(job: Encoding, shards: dict[int, Shard], workers: int, backend: str) -> None:
    for part in job.folder.glob(".*.part.*"):  # of a run that was killed in the middle of writing
        part.unlink(missing_ok=True)
    if backend == "local":
        job.tokenizer.to(best_device())
    missing = [number for number in range(job.shards) if number not in shards]
    named: set[str] = set()
    started, clips = time.monotonic(), 0
    for number in (local if backend == "local" else with_ray)(job, missing, workers):
        shard = shards[number] = Shard(job.path(number))
        clips += len(shard)
        for key, reason in shard.notes["failures"]:
            if key not in named:
                named.add(key)
                print(f"left out: {reason}", file=sys.stderr)
        rate = clips / (time.monotonic() - started)
        print(f"{job.folder.name}: {len(shards)} of {job.shards} shards, {rate:.0f} clips/s", flush=True)
    index = job.write_index(shards)
    print(f"wrote {job.folder}: {index['clips']} clips in {len(shards)} shards, {index['left_out']} clips left out")
    if not index["clips"]:
        raise ValueError(f"no clip could be read, the first because {next(iter(index['failures'].values()))}")
