"""The suite `gpu`: attention, training and decoding of large models, as shares of what the same GPU does at most.

Without a GPU everything runs once with toy models, to see that it runs; then there are no figures at all, only the
names of those that are missing.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reelm.engine.benchmark import TOLERANCE, Settings, show
from reelm.lm.attention import attention
from reelm.lm.heads import Factorized
from reelm.lm.language_model import LanguageModel
from reelm.lm.packed import in_one_row
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Vocabulary

Works = dict[str, Callable[[], Any]]
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s that the vendor names (SXM boards)


@dataclass(frozen=True)
class Sizes:
    """models: width, depth, heads and kv_heads by name, the last one decodes. columns: of a sequence in training;
    batch: of these. context: columns in decoding. attention: batch, heads, columns, head dimension and prefix."""

    models: dict[str, tuple[int, int, int, int]]
    columns: int
    batch: int
    context: int
    attention: tuple[int, int, int, int, int]
    copied: int
    product: int


LARGE = Sizes(
    {"300m": (1024, 26, 8, 4), "1b": (2048, 22, 16, 4)}, 2048, 4, 2048, (4, 16, 8192, 128, 2048), 2 << 30, 8192
)
TOY = Sizes({"300m": (32, 1, 2, 1), "1b": (48, 2, 2, 1)}, 24, 2, 16, (1, 2, 32, 16, 8), 1 << 16, 64)


class Bench:
    """Where and how is measured. figures: what came out. missing: what did not, and why."""

    def __init__(self, settings: Settings) -> None:
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.sizes = LARGE if self.gpu else TOY
        self.rounds = 1 if not self.gpu else 3 if settings.quick else settings.rounds
        self.figures: dict[str, float] = {}
        self.missing: dict[str, str] = {}

    def seconds(self, works: Works, repeat: int = 1) -> dict[str, list[float]]:
        """Of one call of each, in turn, once a round; a work that cannot run here is left out, and why is kept."""
        taken: dict[str, list[float]] = {}
        for name, work in works.items():
            try:
                for _ in range(2):  # the first compiles, and makes what later ones reuse
                    work()
                taken[name] = []
            except (ValueError, RuntimeError) as error:  # of torch: no kernel or no memory for it
                self.missing[name] = str(error).splitlines()[0]
        for _ in range(self.rounds):
            for name, rounds in taken.items():
                self._wait()
                start = time.perf_counter()
                for _ in range(repeat):
                    works[name]()
                self._wait()
                rounds.append((time.perf_counter() - start) / repeat)
        return taken

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def keep(self, name: str, value: float) -> None:
        """A figure, or where there is no GPU its name alone."""
        if self.gpu:
            self.figures[name] = value
        else:
            self.missing[name] = "no GPU"


def ceilings(bench: Bench) -> tuple[float, float]:
    """Bytes that a copy reads and writes a second, and operations of a product of bfloat16 matrices."""
    source = torch.ones(bench.sizes.copied, dtype=torch.uint8, device=bench.device)
    target, n = torch.empty_like(source), bench.sizes.product
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    taken = bench.seconds({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b, "again": lambda: a @ b}, 10)
    copied, done = (statistics.median(taken[name]) for name in ("copy", "gemm"))
    bench.keep("copy_bytes_per_s", 2 * source.nbytes / copied)
    bench.keep("gemm_bf16_flops_per_s", 2 * n**3 / done)
    bench.keep("same_twice", statistics.median(x / y for x, y in zip(taken["again"], taken["gemm"], strict=True)))
    return 2 * source.nbytes / copied, 2 * n**3 / done


def attentions(bench: Bench) -> None:
    """Prefix-LM attention forward and backward in each way, and causal attention; only the area that is seen counts."""
    batch, heads, columns, size, prefix = bench.sizes.attention
    q, k, v = (torch.randn(batch, heads, columns, size, device=bench.device, dtype=torch.bfloat16) for _ in range(3))

    for x in (q, k, v):
        x.requires_grad_(bench.gpu)  # FlexAttention has no backward pass on CPUs

    def both(function: Callable[..., Tensor]) -> Callable[[], None]:
        def work() -> None:
            out = function(q, k, v)
            if bench.gpu:
                out.sum().backward()

        return work

    causal = columns * (columns + 1) / 2
    area = {"attention_causal": causal}
    works = {"attention_causal": both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))}
    for backend in ("sdpa", "flex", "flash"):
        name = f"attention_prefix_{backend}"
        works[name] = both(lambda q, k, v, backend=backend: attention(q, k, v, prefix, backend))
        area[name] = causal + prefix * (prefix - 1) / 2
    taken = bench.seconds(works)
    of_a_pair = 4 * batch * heads * size * (3.5 if bench.gpu else 1)  # backward: 2.5 times forward
    for name, rounds in taken.items():
        bench.keep(f"{name}_flops_per_s", of_a_pair * area[name] / statistics.median(rounds))
        if name != "attention_causal":
            ratio = statistics.median(a / b for a, b in zip(taken["attention_causal"], rounds, strict=True))
            bench.keep(f"{name}_over_causal", ratio * area[name] / causal)


def model(bench: Bench, name: str, backend: str = "sdpa") -> LanguageModel:
    """A model of this size with random weights."""
    width, depth, heads, kv_heads = bench.sizes.models[name]
    with torch.device(bench.device):
        vocabulary = Vocabulary(visual=1 << 18)
        return LanguageModel(
            Transformer(width, depth, heads, kv_heads, attention=backend), Factorized(vocabulary, width, tied=False)
        )


def example(bench: Bench, rows: int, prefix: int) -> Sequence:
    columns, device = bench.sizes.columns, bench.device
    ids = torch.randint(SPECIAL, SPECIAL + (1 << 18), (rows, columns), device=device)
    places = torch.arange(columns, device=device)
    positions = torch.stack([places // 256, places // 16 % 16, places % 16], -1).expand(rows, -1, -1)
    return Sequence(ids, positions, prefix, (places >= prefix).expand(rows, -1))


def trainings(bench: Bench, name: str, gemm: float) -> None:
    """A compiled step of training in bfloat16 with AdamW: tokens a second, and share of the products; SDPA beside
    FlashAttention, rows beside a packed row. Work counted: six operations a weight and token, and attention's area."""
    rows, columns = bench.sizes.batch, bench.sizes.columns
    prefix = columns // 4
    plain = example(bench, rows, prefix)
    packed = in_one_row([plain])
    width, depth = bench.sizes.models[name][:2]
    area = columns * (columns + 1) / 2 + prefix * (prefix - 1) / 2
    for way, sequence, backend in (
        ("sdpa", plain, "sdpa"), ("flash", plain, "flash"), ("packed_flash", packed, "flash"),
    ):  # fmt: skip
        label = f"train_{name}_{way}"
        lm = model(bench, name, backend).train()
        if bench.gpu:
            for block in lm.transformer.blocks:
                block.compile(dynamic=True)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=bench.gpu)

        def work(lm: LanguageModel = lm, optimizer: Any = optimizer, sequence: Sequence = sequence) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss, _ = lm.loss(sequence)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        taken = bench.seconds({label: work}).get(label)
        if taken:
            seconds, tokens = statistics.median(taken), rows * columns
            weights = sum(p.numel() for n, p in lm.named_parameters() if "site_tables" not in n and "head." not in n)
            scores = 2 * 512 * width  # two tables of 512 rows score each token
            cost = 6 * (weights + scores) * tokens + 3 * 4 * width * depth * rows * area
            bench.keep(f"{label}_tokens_per_s", tokens / seconds)
            bench.keep(f"{label}_share_of_gemm", cost / seconds / gemm)
            named = torch.cuda.get_device_name() if bench.gpu else "H100"
            peak = next((value for board, value in PEAKS.items() if board in named), None)
            if peak:
                bench.keep(f"{label}_mfu", cost / seconds / peak)
        del lm, optimizer, work


@contextlib.contextmanager
def captured(work: Callable[[], Any], gpu: bool) -> Iterator[Callable[[], Any]]:
    """The same as one CUDA graph; without a GPU as it is."""
    if not gpu:
        yield work
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    yield graph.replay


@torch.no_grad()
def decoding(bench: Bench, copy: float) -> None:
    """A pass of one token at the end of a full context, bfloat16, one clip: bytes read a second over those of a copy.

    The pass goes from an id to the next one; its cache stays at the same length, so that it can be one CUDA graph.
    """
    name, context, device = list(bench.sizes.models)[-1], bench.sizes.context, bench.device
    lm = model(bench, name).eval().to(torch.bfloat16)
    cache = lm.transformer.new_cache(1, context)
    for table in (*cache.keys, *cache.values):
        table.zero_()
    ids = torch.full((1, 1), SPECIAL, device=device)
    here = torch.tensor([[[3, 5, 7]]], device=device)
    current = Sequence(ids, here, prefix=0)

    def work() -> None:
        cache.length = context - 1
        hidden = lm.transformer(lm.head.embed(ids), current, cache)
        ids.copy_(lm.head.sample(hidden[:, -1], lambda logits: logits.argmax(-1))[:, None])

    tables = {id(m.weight) for m in lm.modules() if isinstance(m, nn.Embedding)}  # of which a row is read
    read = sum(p.nbytes for p in lm.parameters() if id(p) not in tables)
    read += sum(table.nbytes for table in (*cache.keys, *cache.values))
    with captured(work, bench.gpu) as graph:
        taken = bench.seconds({f"decode_{name}_eager": work, f"decode_{name}_graph": graph}, 10)
    for label, rounds in taken.items():
        bench.keep(f"{label}_tokens_per_s", 1 / statistics.median(rounds))
        bench.keep(f"{label}_share_of_copy", read / statistics.median(rounds) / copy)


def run(settings: Settings, output: Path) -> dict[str, Any]:
    """Measures, prints a table and writes it as JSON."""
    bench = Bench(settings)
    copy, gemm = ceilings(bench)
    attentions(bench)
    decoding(bench, copy)
    for name in bench.sizes.models:
        trainings(bench, name, gemm)
    same = bench.figures.get("same_twice")
    results: dict[str, Any] = {
        "suite": "gpu",
        "device": torch.cuda.get_device_name() if bench.gpu else None,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rounds": bench.rounds,
        "trustworthy": same is not None and abs(same - 1) <= TOLERANCE and not settings.quick,
        "figures": bench.figures,
        "missing": bench.missing,
    }
    return show(results, table(results), output)


def table(results: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"{name:44}{value:16.4g}" for name, value in results["figures"].items()]
    lines += [f"{name:44}{'missing':>16}  {why}" for name, why in results["missing"].items()]
    if results["device"] is None:
        lines.append("no GPU: everything above was run with toy models and nothing was measured")
    else:
        verdict = "" if results["trustworthy"] else " (not to be trusted: a busy machine, or quick=true)"
        lines.append(f"{results['device']}, torch {results['torch']}{verdict}")
    return "\n".join(lines)
