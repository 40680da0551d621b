"""The suite `decode`: what a pass costs beside what it must, and what each way of decoding makes of a clip.

Both tables are taken in turn, as in benchmark.py, and have one arm twice: how far its two figures are apart tells how
far the rest can be trusted.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelm.data.zoetrope.captions import Attributes, parse
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.benchmark import TOLERANCE, Arm, Settings, circumstances, measure, show
from reelm.engine.qwen3 import to_qwen3
from reelm.engine.video_lm import VideoLM
from reelm.evaluation.zoetrope_judge import Tally
from reelm.evaluation.zoetrope_reading import read
from reelm.lm.compiled import Passes
from reelm.lm.decoding import OneByOne, generate
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.parallel import Blocks, Diagonal
from reelm.lm.precision import FORMATS, fastest, lighten
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.speculative import Jacobi
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.task import Given
from reelm.tokenizers.tokens import Tokens

PROMPT = "a red star moves left while a blue circle bounces"
WAYS = {
    "one by one": OneByOne(),
    "Jacobi": Jacobi(),
    "Jacobi, window 32": Jacobi(32),
    "Jacobi, maximal coupling": Jacobi(16, "maximal"),
    "Jacobi, window 64": Jacobi(64, columns=128),
    "Jacobi, lenience 30": Jacobi(24, "maximal", lenience=30),
    "Jacobi, lenience 30, window 64": Jacobi(64, "maximal", lenience=30, columns=128),
    "Jacobi, lenience 30, window 128": Jacobi(128, "maximal", lenience=30, columns=256),
    "diagonals": Diagonal(),
    "blocks, 2 x 2": Blocks(2, 2),
}
COMPILED = "float32, compiled"
EXACT = ("one by one", "Jacobi")  # those that are tried with lighter weights too


def stack(lm: LanguageModel, rows: int) -> Arm:
    """The linear layers that a pass over a video's tokens goes through, and nothing else."""
    used = itertools.chain(lm.transformer.modules(), lm.visual.modules())
    layers = [module for module in used if isinstance(module, nn.Linear)]
    inputs = {n: torch.randn(rows, n) for n in {layer.in_features for layer in layers}}

    @torch.inference_mode()
    def work() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return Arm(work, 1, "passes/s")


def step(model: VideoLM, lm: LanguageModel, tokens: int, sampling: Sampling) -> Arm:
    """Passes of one token each, with all that belongs to them; the first one, of the prompt, is among them."""
    given = Given(model.shape, (PROMPT,), fps=model.fps)
    sequence = model.packer.pack(given, model.task("t2v").marker)
    unprompted, where = sequence.without_prompt(), Tokens.positions(model.packer.grid(given))[:tokens]

    def work() -> None:
        generate(lm.transformer, lm.visual, sequence, where, sampling, unprompted, seeded([0]))

    return Arm(work, len(where), "passes/s")


def in_compiled_passes(lm: LanguageModel) -> LanguageModel:
    """The same model, which decodes in compiled passes."""
    lm = copy.deepcopy(lm)
    lm.transformer.passes = Passes(lm.transformer)
    return lm


def peers(size: Transformer, tokens: int, name: str, compiled: bool) -> dict[str, Arm]:
    """`transformers` with the same weights as ours, as Qwen3 is shaped, greedy and without guidance; and the bare
    linear layers. All names begin with `name`. compiled: also our passes compiled, which takes half a minute."""
    shape = {part: getattr(size, part) for part in ("width", "depth", "heads", "kv_heads", "mlp_ratio")}
    vocabulary = Vocabulary(4096)
    head = Categorical(vocabulary, size.width, offset=0, size=vocabulary.size - 1)
    lm = LanguageModel(Transformer(**shape, rope="1d", sites=None), head).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    ids = torch.tensor([[300]])
    sequence = Sequence(ids, torch.zeros(1, 1, 3, dtype=torch.long), prefix=1)
    where = torch.zeros(tokens, 3, dtype=torch.long)
    options = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    arms, made = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = to_qwen3(lm).to(dtype)
        arm = f"{name}: transformers {str(dtype).removeprefix('torch.')}"
        arms[arm] = Arm(lambda theirs=theirs: theirs.generate(ids, **options), tokens, "tokens/s")
        made[dtype] = arms[arm].work()[:, 1:]
    for dtype in FORMATS:
        light = copy.deepcopy(lm)
        lighten(light, dtype)
        arguments = (light.transformer, light.head, sequence, where, Sampling(0.0))
        arms[f"{name}: linear layers {dtype}"] = stack(light, 1)
        arms[f"{name}: ours {dtype}"] = Arm(lambda arguments=arguments: generate(*arguments), tokens, "tokens/s")
    if compiled:
        light = in_compiled_passes(lm)
        arguments = (light.transformer, light.head, sequence, where, Sampling(0.0))
        arms[f"{name}: ours {COMPILED}"] = Arm(lambda arguments=arguments: generate(*arguments), tokens, "tokens/s")
    if not torch.equal(made[torch.float32], arms[f"{name}: ours float32"].work()):
        raise RuntimeError("transformers and this model make other tokens of the same weights")
    return arms


def costs(model: VideoLM, lms: dict[str, LanguageModel], larger: Transformer, settings: Settings) -> dict[str, Any]:
    """What a pass costs: beside its linear layers, with and without guidance, beside `transformers`; and the same of a
    larger transformer, whose weights take longer to read than all that is small takes to do."""
    tokens, rounds = (4, 3) if settings.quick else (32, settings.rounds)
    compiled = not settings.quick
    kinds = (*lms, *(COMPILED,) * compiled)
    guided, alone = Sampling(top_p=0.95, guidance=2.0), Sampling(top_p=0.95)
    arms: dict[str, Arm] = {}
    for dtype, lm in lms.items():
        arms[f"linear layers {dtype}"] = stack(lm, 2)
    for kind, lm in (lms | {COMPILED: in_compiled_passes(lms["float32"])} if compiled else lms).items():
        arms[f"pass {kind}"] = step(model, lm, tokens, guided)
        arms[f"pass without guidance {kind}"] = step(model, lm, tokens, alone)
    arms["pass float32 again"] = step(model, lms["float32"], tokens, guided)
    sizes = {"box": lms["float32"].transformer, "larger": larger}
    for name, size in sizes.items():
        arms |= peers(size, tokens, name, compiled)
    measure(arms, rounds, settings.threads)
    rate = {name: arm.rate for name, arm in arms.items()}

    def ratio(top: str, bottom: str) -> float:
        """The median of the ratios of the rounds."""
        return statistics.median(a / b for a, b in zip(arms[top].rates, arms[bottom].rates, strict=True))

    best: dict[str, dict[str, float]] = {}
    for name in sizes:
        theirs = max((f"{name}: transformers {dtype}" for dtype in FORMATS[:2]), key=rate.__getitem__)
        ours = max((f"{name}: ours {kind}" for kind in kinds), key=rate.__getitem__)
        best[name] = {
            kind: ratio(f"{name}: ours {kind}", f"{name}: transformers float32")
            for kind in kinds
            if kind.startswith("float32")
        }
        best[name][f"best ({ours.split(': ours ')[1]} over {theirs.split()[-1]})"] = ratio(ours, theirs)
    return {
        "rates": rate,
        "same_twice": ratio("pass float32 again", "pass float32"),
        "share_of_linear_layers": {k: ratio(f"pass {k}", f"linear layers {k.split(',')[0]}") for k in kinds},
        "cost_of_guidance": {k: ratio(f"pass without guidance {k}", f"pass {k}") for k in kinds},
        "times_transformers": best,
        "share_of_linear_layers_alone": {  # one row, no guidance, no sampling to speak of
            name: {k: ratio(f"{name}: ours {k}", f"{name}: linear layers {k.split(',')[0]}") for k in kinds}
            for name in sizes
        },
        "parameters": {name: sum(p.numel() for p in size.parameters()) for name, size in sizes.items()},
    }


@dataclass
class Way:
    """One way of making clips, and what became of it."""

    lm: LanguageModel
    sampling: Sampling
    seconds: list[float] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    codes: list[torch.Tensor] = field(default_factory=list)


def ways(model: VideoLM, lms: dict[str, LanguageModel], clips: int, threads: int) -> dict[str, Any]:
    """Passes, seconds and right attributes of clips made in each way, one clip at a time, each clip in every way."""
    world = Zoetrope("validation", size=model.shape[1:], frames=model.shape[0], fps=model.fps, short_captions=0)
    arms = {
        f"{name} ({dtype})": Way(lm, replace(model.sampling, decoding=decoding))
        for name, decoding in WAYS.items()
        for dtype, lm in lms.items()
        if dtype == "float32" or name in EXACT
    }
    first = next(iter(arms))
    arms[f"{first} again"] = replace(arms[first], seconds=[], passes=[], tally=Tally(), codes=[])
    clock = time.thread_time if threads == 1 else time.perf_counter
    for index in range(clips):
        caption = world.get(index).captions[0]
        asked: Attributes = parse(caption)
        for way in arms.values():
            passes, made = [], []
            model.lm = way.lm
            started = clock()
            clip = model.generate(
                caption, "t2v", way.sampling, index, progress=lambda *_, passes=passes: passes.append(1), made=made
            )
            way.seconds.append(clock() - started)
            way.passes.append(len(passes))
            way.tally.add(read(clip.video[0]), asked)
            way.codes.append(torch.cat(made, 1))
    reference = arms[first]
    results = {}
    for name, way in arms.items():
        same = [a.shape == b.shape and bool((a == b).all()) for a, b in zip(way.codes, reference.codes, strict=True)]
        results[name] = {
            "passes": statistics.mean(way.passes),
            "seconds": statistics.mean(way.seconds),
            "fewer_passes": statistics.mean(reference.passes) / statistics.mean(way.passes),
            "faster": sum(reference.seconds) / sum(way.seconds),
            "right": way.tally.shares()["all"]["all"],
            "same_tokens": sum(same) / clips,
        }
    return results


def run(
    model: VideoLM, larger: Transformer, settings: Settings, clips: int, output: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Measures, prints the tables and writes them as JSON.

    larger: a transformer with random weights, of which the cost of a pass is measured too.
    """
    torch.set_num_threads(settings.threads)
    clips = 1 if settings.quick else clips
    lms = {dtype: copy.deepcopy(model.lm) for dtype in FORMATS}
    for dtype, lm in lms.items():
        lighten(lm, dtype)
    results: dict[str, Any] = {
        **about,
        **circumstances(settings),
        "parameters": sum(p.numel() for p in model.lm.parameters()),
        "fastest_format": fastest(model.lm),
        "costs": costs(model, lms, larger, settings),
        "clips": clips,
        "ways": ways(model, lms, clips, settings.threads) if clips else {},
    }
    results["trustworthy"] = abs(results["costs"]["same_twice"] - 1) <= TOLERANCE and not settings.quick
    return show(results, table(results), output)


def table(results: dict[str, Any]) -> str:
    """What a person reads."""
    costs, lines = results["costs"], []
    for name, rate in costs["rates"].items():
        lines.append(f"{name:34}{rate:9.1f} a second")
    for kind, share in costs["share_of_linear_layers"].items():
        guidance = costs["cost_of_guidance"][kind]
        lines.append(f"{kind}: {share:.2f} of the bare linear layers; guidance costs {guidance:.2f} times")
    for size, kinds in costs["times_transformers"].items():
        lines.append(f"{size}, {costs['parameters'][size] / 1e6:.1f} M parameters in the transformer, one row, greedy:")
        lines += [f"  {times:.2f} times transformers' generate, {name}" for name, times in kinds.items()]
        shares = costs["share_of_linear_layers_alone"][size].items()
        lines.append("  " + ", ".join(f"{share:.2f} of the linear layers in {dtype}" for dtype, share in shares))
    lines.append(f"{'':38}{'passes':>8}{'fewer':>7}{'seconds':>9}{'faster':>8}{'right %':>9}{'same tokens %':>15}")
    for name, way in results["ways"].items():
        lines.append(
            f"{name:38}{way['passes']:8.1f}{way['fewer_passes']:7.1f}{way['seconds']:9.2f}{way['faster']:8.2f}"
            f"{100 * way['right']:9.1f}{100 * way['same_tokens']:15.0f}"
        )
    load = ", ".join(f"{value:.1f}" for value in results["load_average"])
    verdict = "" if results["trustworthy"] else " (not to be trusted: a busy machine, or quick=true)"
    lines.append(
        f"{results['machine']}, {results['threads']} thread(s), {results['clock']}, {results['weights']} weights, "
        f"{results['clips']} clips, load {load}; the same twice: {costs['same_twice']:.3f}{verdict}"
    )
    return "\n".join(lines)
