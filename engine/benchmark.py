"""How fast the parts are, each beside what the same machine did in the same minutes at most.

Measurements are taken in turn, once a round, and their medians reported: whatever else the machine does falls on all
alike. One measurement is taken twice in every round: how far the two medians are apart tells how far the rest can
be trusted.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from reelm.data.module import ClipData, ClipSource
from reelm.data.writing import whole_file
from reelm.engine import fit
from reelm.engine.model_training import train_text
from reelm.engine.optimisation import Optimisation
from reelm.engine.video_lm import VideoLM
from reelm.lm.decoding import generate
from reelm.lm.language_model import LanguageModel
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.task import Given
from reelm.tokenizers.quantizers import lfq_entropy
from reelm.tokenizers.tokens import Tokens

SUITES = ("zoetrope", "decode", "tokenizer", "train", "gpu")
PROMPT = "a red star moves left while a blue circle bounces"
TOLERANCE = 0.03  # by which the two medians of one measurement may differ


@dataclass(frozen=True)
class Settings:
    """suite, rounds, threads, batch, quick: as in conf/benchmark.yaml."""

    suite: str = "zoetrope"
    rounds: int = 15
    threads: int = 1
    batch: int = 4
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "threads", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more; got {getattr(self, name)}")


@dataclass
class Arm:
    """Something to measure.

    work: does it once. amount: of what, in `unit`, one call does. cost: operations or bytes of one call, to be compared
    with those that the ceiling of this name does in the same time.
    """

    work: Callable[[], Any]
    amount: float
    unit: str
    cost: float = 0.0
    ceiling: str | None = None
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def random_model(source: ClipSource, tokenizer: nn.Module, transformer: nn.Module, head: Callable[..., Any]) -> VideoLM:
    """A model with the given parts that has learned nothing, for speed alone."""
    text = train_text(source, 512, captions=500)
    vocabulary = Vocabulary(visual=tokenizer.vocabulary, text=text.vocabulary)
    first = source.get(0)
    lm = LanguageModel(transformer, head(vocabulary=vocabulary, width=transformer.width))
    return VideoLM(tokenizer, text, lm, {"t2v": Generation("t2v")}, (first.frames, *first.size), first.fps).eval()


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions of one call (not those of the optimiser)."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: onednn_flops}) as counter:
        work()
    return counter.get_total_flops()


def onednn_flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


def ceilings(quick: bool) -> dict[str, Arm]:
    """What the machine does at most: reading memory, and multiplying large matrices in each number format."""
    size = 512 if quick else 2048
    work = 2.0 * size**3
    a, b = torch.randn(size, size), torch.randn(size, size)
    a16, b16 = a.bfloat16(), b.bfloat16()
    memory = torch.ones((16 if quick else 256) << 20, dtype=torch.uint8).view(torch.int64)
    x, kernel = torch.randn(4, 128, 5, 16, 16), torch.randn(128, 128, 3, 3, 3)  # one clip alone takes a slower path
    x, kernel = (t.to(memory_format=torch.channels_last_3d) for t in (x, kernel))
    conv_work = 2.0 * 128 * 128 * 27 * x[:, 0].numel()
    arms = {
        "stream": Arm(memory.sum, memory.nbytes, "B/s"),
        "gemm fp32": Arm(lambda: a @ b, work, "FLOP/s"),
        "gemm bf16": Arm(lambda: a16 @ b16, work, "FLOP/s"),
        "conv3d fp32": Arm(lambda: F.conv3d(x, kernel, padding=1), conv_work, "FLOP/s"),
        "gemm fp32 again": Arm(lambda: a @ b, work, "FLOP/s"),
    }
    if "x86" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "x86"
        scale = float(b.abs().max()) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the kernels stay, their tensors are said to go
            weight = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(b, scale, 0, torch.qint8), None)
        arms["gemm int8 dynamic"] = Arm(lambda: torch.ops.quantized.linear_dynamic(a, weight), work, "OP/s")
    return arms


def data_arms(data: ClipData, batch: int, clips: int) -> dict[str, Arm]:
    source, indices = data.train, iter(range(10**6))

    def render() -> None:
        for _ in range(clips):
            source.get(next(indices) % len(source))

    data.batch_size, data.workers = batch, 0
    batches: Iterator = iter(data.train_dataloader())
    window = 4  # batches whose order the loader draws at a time

    def load() -> None:
        for _ in range(window):
            next(batches)

    return {
        "render": Arm(render, clips, "clips/s"),
        "loader": Arm(load, window * batch, "clips/s"),
    }


def tokenizer_arms(model: VideoLM, video: Tensor) -> dict[str, Arm]:
    @torch.inference_mode()
    def encode() -> Tensor:
        return model.tokenizer.encode(video)

    codes = encode()

    @torch.inference_mode()
    def decode() -> Tensor:
        return model.tokenizer.decode(codes)

    latents = torch.randn(2560, 18)
    return {
        "lfq entropy": Arm(lambda: lfq_entropy(latents, 0.01), len(latents), "tokens/s"),
        "tokenizer encode": Arm(encode, len(video), "clips/s", flops(encode), "conv3d fp32"),
        "tokenizer decode": Arm(decode, len(video), "clips/s", flops(decode), "conv3d fp32"),
    }


def training_arm(model: VideoLM, video: Tensor, captions: tuple[str, ...]) -> Arm:
    """Forward, backward and step, at the precision that training would choose."""
    lm = copy.deepcopy(model.lm).train().requires_grad_(True)
    bf16 = fit.best_precision() == "bf16-mixed"
    with torch.no_grad():
        given = Given(model.shape, captions, fps=model.fps)
        sequence = model.packer.pack(given, model.task("t2v").marker, model.tokenizer.encode(video))
    optimizer = Optimisation(lr=1e-4, muon=True).configure(lm, 1000, inner=lm.transformer)["optimizer"]

    def both() -> None:
        with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
            loss, _ = lm.loss(sequence)
        loss.backward()

    def step() -> None:
        both()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    cost = flops(both)
    optimizer.zero_grad()
    return Arm(step, sequence.ids.numel(), "tokens/s", cost, "gemm bf16" if bf16 else "gemm fp32")


def decode_arm(model: VideoLM, tokens: int) -> Arm:
    """One clip, token by token, with guidance: both halves of the batch read the weights together."""
    given, lm = Given(model.shape, (PROMPT,), fps=model.fps), model.lm
    sequence = model.packer.pack(given, model.task("t2v").marker)
    unprompted = sequence.without_prompt()
    where = Tokens.positions(model.packer.grid(given))[:tokens]
    sampling = Sampling(top_p=0.95, guidance=2.0)

    def decode() -> None:
        generate(lm.transformer, lm.visual, sequence, where, sampling, unprompted, seeded([0]))

    tables = {id(m.weight) for m in lm.modules() if isinstance(m, nn.Embedding)}  # of which a few rows are read
    weights = sum(p.nbytes for p in lm.parameters() if id(p) not in tables)
    if lm.visual.tied:  # the tables score the visual ids too, and for that they are read as wholes
        weights += 4 * lm.visual.size_of_logits * lm.visual.width
    return Arm(decode, len(where), "tokens/s", float(weights * len(where)), "stream")


def circumstances(settings: Settings) -> dict[str, Any]:
    """Where and how was measured."""
    return {
        "suite": settings.suite,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": settings.threads,
        "clock": "processor time" if settings.threads == 1 else "wall time",
        "load_average": list(os.getloadavg()),
    }


def show(results: dict[str, Any], text: str, output: Path) -> dict[str, Any]:
    """Prints a table and writes the results as JSON."""
    print(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as part:
        part.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")
    return results


def measure(arms: dict[str, Arm], rounds: int, threads: int) -> None:
    """Fills the arms' rates."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    for arm in arms.values():
        arm.work()  # the first call prepares what later ones reuse
    for _ in range(rounds):
        for arm in arms.values():
            start = clock()
            arm.work()
            arm.rates.append(arm.amount / max(clock() - start, 1e-9))


def run(model: VideoLM, data: ClipData, settings: Settings, output: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Measures, prints a table and writes it as JSON."""
    torch.set_num_threads(settings.threads)
    quick, rounds = settings.quick, 3 if settings.quick else settings.rounds
    batch = 1 if quick else settings.batch
    clips = [data.train.get(i, frames=model.shape[0]) for i in range(batch)]
    clip = clips[0].stack(clips)
    arms = ceilings(quick)
    top = list(arms)
    if settings.suite == "zoetrope":
        arms |= data_arms(data, batch, clips=2 if quick else 8)
        arms |= tokenizer_arms(model, clip.video)
    arms["train"] = training_arm(model, clip.video, clip.captions)
    arms["decode"] = decode_arm(model, 8 if quick else 64)
    measure(arms, rounds, settings.threads)

    again = arms["gemm fp32 again"].rate / arms["gemm fp32"].rate
    results: dict[str, Any] = {
        **about,
        **circumstances(settings),
        "rounds": rounds,
        "same_twice": again,
        "trustworthy": abs(again - 1) <= TOLERANCE and not quick,
        "parameters": sum(p.numel() for p in model.lm.parameters()),
        "rates": {},
    }
    for name, arm in arms.items():
        entry: dict[str, Any] = {
            "rate": arm.rate,
            "unit": arm.unit,
            "slowest": min(arm.rates),
            "fastest": max(arm.rates),
        }
        if arm.ceiling:
            entry |= {
                "work_per_s": arm.rate / arm.amount * arm.cost,
                "ceiling": arm.ceiling,
                "share": arm.rate / arm.amount * arm.cost / arms[arm.ceiling].rate,
            }
        results["rates"][name] = entry
    return show(results, table(results, top), output)


def table(results: dict[str, Any], ceilings: list[str]) -> str:
    """What a person reads."""
    lines = []
    for name, entry in results["rates"].items():
        if name in ceilings:
            lines.append(f"{name:20}{entry['rate'] / 1e9:10.1f} G{entry['unit']}")
        else:
            share = f"   {entry['share']:.0%} of {entry['ceiling']}" if "ceiling" in entry else ""
            lines.append(f"{name:20}{entry['rate']:10.1f} {entry['unit']}{share}")
    load = ", ".join(f"{value:.1f}" for value in results["load_average"])
    verdict = "" if results["trustworthy"] else " (not to be trusted: a busy machine, or quick=true)"
    lines.append(
        f"{results['machine']}, {results['threads']} thread(s), {results['clock']}, {results['weights']} weights, "
        f"load {load}; the same twice: {results['same_twice']:.3f}{verdict}"
    )
    return "\n".join(lines)
