"""How fast our tokenizers encode and decode, and what memory they need, beside other projects' of as many parameters.

Ours and those of diffusers are timed in this process, magvit2-pytorch in one of its own, in turn, once a round; what is
reported are medians over rounds of our time divided by theirs. Ours is timed twice in every round: where the two
differ by more than 3 %, the row is void.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelm.engine import store
from reelm.engine.benchmark import TOLERANCE, Settings, ceilings, circumstances, measure, show
from reelm.engine.peers import PEERS, install, installed, matched, ours
from reelm.engine.workers import DTYPES, SERVE, WORK, Shape, Timed, Worker

FRAMES = 17
OURS, AGAIN = "ours", "ours again"


@dataclass(frozen=True)
class Peers:
    """What is compared; the fields are those of conf/benchmark.yaml that only suite=tokenizer has.

    names: of PEERS. sizes: sides of the square clips; the first is measured every round. large: rounds of the others.
    dtypes: of DTYPES. folder: where magvit2-pytorch is installed. memory: whether it is measured, too.
    """

    names: tuple[str, ...] = tuple(PEERS)
    sizes: tuple[int, ...] = (128, 256)
    large: int = 3
    dtypes: tuple[str, ...] = ("float32",)
    folder: Path = Path("outputs/peers")
    memory: bool = True

    def __post_init__(self) -> None:
        for what, given, known in (("peers", self.names, PEERS), ("dtypes", self.dtypes, DTYPES)):
            if wrong := [name for name in given if name not in known]:
                raise ValueError(f"{what} has {wrong[0]}, which is none of {', '.join(known)}")
        if not self.sizes or not self.dtypes or min(self.sizes) < 1:
            raise ValueError(f"give one of sizes and dtypes or more; got {list(self.sizes)}, {list(self.dtypes)}")
        if self.large < 1:
            raise ValueError(f"large is 1 or more; got {self.large}")


@dataclass
class Row:
    """One measurement of ours and of all peers; `seconds` of each are in the order of rounds."""

    model: str
    what: str
    size: int
    dtype: str
    seconds: dict[str, list[float]]

    def ratios(self, peer: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[OURS], self.seconds[peer])]

    def report(self) -> dict[str, Any]:
        times = {name: statistics.median(each) for name, each in self.seconds.items()}
        peers = [name for name in times if name not in (OURS, AGAIN)]
        again = statistics.median(self.ratios(AGAIN))
        best = min(peers, key=times.get) if peers else None
        return {
            "model": self.model, "what": self.what, "size": self.size, "dtype": self.dtype,
            "rounds": len(self.seconds[OURS]),
            "ms_per_frame": {name: 1e3 * value / FRAMES for name, value in times.items()},
            "ratio": {name: [statistics.median(self.ratios(name)), *interval(self.ratios(name))] for name in peers},
            "best_peer": best, "same_twice": again, "void": abs(again - 1) > TOLERANCE,
        }  # fmt: skip


Measured = tuple[Row, dict[str, Callable[[], float]]]  # a row and what, for each, takes a measurement


def interval(values: Sequence[float], level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Bootstrap confidence interval of the median."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    cut = round((1 - level) / 2 * draws)
    return medians[cut], medians[-1 - cut]


def rivals(peers: Peers, parameters: int, threads: int, stack: ExitStack) -> dict[str, Timed | Worker]:
    """The peers that can be had, each with about as many parameters; one line says why another one is left out."""
    found: dict[str, Timed | Worker] = {}
    for name in peers.names:
        peer = PEERS[name]
        try:
            if peer.library == "diffusers":
                if not installed("diffusers"):
                    raise RuntimeError("it is in diffusers: pip install 'reelm[outside]'")
                found[name] = Timed(matched(peer.build, parameters), threads)
            else:
                about = {"peer": name, "parameters": parameters, "model": None, "threads": threads}
                found[name] = stack.enter_context(Worker(SERVE, install(peers.folder / name), **about))
        except RuntimeError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def rows_of(model: str, codecs: dict[str, Timed | Worker], peers: Peers) -> list[Measured]:
    rows = []
    for size in peers.sizes:
        shape: Shape = (FRAMES, size, size)
        for dtype in peers.dtypes:
            for what in WORK:
                row = Row(model, what, size, dtype, {name: [] for name in codecs})
                rows.append((row, {n: lambda c=c, a=(what, shape, dtype): c.seconds(*a) for n, c in codecs.items()}))
    return rows


def interleave(rows: list[Measured], rounds: int, large: int, first: int) -> None:
    """Fills the rows' times: those of size `first` every round, the others in `large` rounds, evenly spread."""
    for round_ in range(rounds):
        also = round_ * large // rounds != (round_ - 1) * large // rounds
        for row, arms in rows:
            if row.size == first or also:
                for name, seconds in arms.items():
                    row.seconds[name].append(seconds())


def memory_of(codec: Timed | Worker, name: str, model: nn.Module, peers: Peers) -> dict[int, dict[str, int]]:
    """Bytes held at most, by size and work, in a process that does nothing else."""
    about: dict[str, Any] = {"peer": None, "parameters": 0, "model": store.describe(model)}
    if name != OURS:
        about |= {"peer": name, "parameters": codec.parameters, "model": None}
    path = peers.folder / name if name in PEERS and PEERS[name].library != "diffusers" else None
    with Worker(SERVE, path, threads=1, **about) as worker:
        return {size: worker.memory((FRAMES, size, size)) for size in peers.sizes}


def run(models: dict[str, nn.Module], peers: Peers, settings: Settings, output: Path) -> dict[str, Any]:
    """Measures the named tokenizers, prints a table and writes it as JSON."""
    torch.set_num_threads(settings.threads)
    began = time.time()
    if settings.quick:
        peers = Peers((), (32,), 1, peers.dtypes, peers.folder, memory=False)
    for size in peers.sizes:
        for model in models.values():
            model.grid(FRAMES, size, size)  # a mistake is told before anything is installed
    with ExitStack() as stack:
        rows, sizes, memory = [], {}, {}
        for name, model in models.items():
            own = Timed(ours(model.eval()), settings.threads)
            codecs = {OURS: own, **rivals(peers, own.parameters, settings.threads, stack), AGAIN: own}
            sizes[name] = {each: codec.parameters for each, codec in codecs.items() if each != AGAIN}
            rows += rows_of(name, codecs, peers)
            if peers.memory:
                parts = {each: codec for each, codec in codecs.items() if each != AGAIN}
                memory[name] = {each: memory_of(codec, each, model, peers) for each, codec in parts.items()}
        for _, arms in rows:
            for seconds in arms.values():
                seconds()  # the first call prepares what later ones reuse
        top = ceilings(settings.quick)
        rounds = 3 if settings.quick else settings.rounds
        interleave(rows, rounds, min(peers.large, rounds), peers.sizes[0])
        measure(top, rounds, settings.threads)
    reports = [row.report() for row, _ in rows]
    results = {
        **circumstances(settings), "seconds": time.time() - began,
        "trustworthy": not settings.quick and not any(report["void"] for report in reports),
        "ceilings": {name: {"rate": arm.rate, "unit": arm.unit} for name, arm in top.items()},
        "frames": FRAMES, "parameters": sizes, "rows": reports, "memory": memory,
    }  # fmt: skip
    return show(results, table(results), output)


def table(results: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"{name:20}{top['rate'] / 1e9:10.1f} G{top['unit']}" for name, top in results["ceilings"].items()]
    for model, counts in results["parameters"].items():
        lines.append(f"\n{model}, parameters: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in counts.items()))
        for row in (row for row in results["rows"] if row["model"] == model):
            times = row["ms_per_frame"]
            lines.append(
                f"  {row['what']} {row['size']}, {row['dtype']}: {times[OURS]:.2f} ms a frame, {row['rounds']} rounds, "
                f"the same twice: {row['same_twice']:.3f}{' VOID' if row['void'] else ''}"
            )
            for name, (ratio, low, high) in row["ratio"].items():
                best = ", the fastest" if name == row["best_peer"] else ""
                lines.append(f"    {ratio:.3f} ({low:.3f} to {high:.3f}) of {name}'s {times[name]:.2f}{best}")
        for name, of_sizes in results["memory"].get(model, {}).items():
            each = (f"{what} {size}: {n / 1e6:.0f} MB" for size, both in of_sizes.items() for what, n in both.items())
            lines.append(f"  memory of {name}, {', '.join(each)}")
    load = ", ".join(f"{value:.1f}" for value in results["load_average"])
    verdict = "" if results["trustworthy"] else " (not to be trusted: a busy machine, or quick=true)"
    lines.append(
        f"\n{results['machine']}, {results['threads']} thread(s), {results['clock']}, load {load}, "
        f"{results['seconds'] / 60:.1f} minutes{verdict}"
    )
    return "\n".join(lines)
